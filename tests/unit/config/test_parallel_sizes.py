"""How sizes fill up the ranks of a run, or why they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilit.config import AcceleratorConfig, FSDPConfig
from omnilit.config.parallel_sizes import ParallelSizes, describe, fit_data_sizes
from omnilit.errors import ConfigError
from tests.helpers.sizes import resolved_sizes

KEY = "train.accelerator"


@settings(max_examples=60)
@given(resolved_sizes())
def test_sizes_multiply_to_the_ranks_in_every_view(sizes: ParallelSizes):
    world = sizes.world_size
    assert not sizes.problems(world)
    assert sizes.resolve(world) == sizes
    assert sizes.data_size * sizes.sharing_size == world
    assert sizes.pp_size * sizes.replicate_size * sizes.fsdp_size * sizes.tp_size == world
    experts = sizes.efsdp_size * sizes.ep_size
    assert experts == sizes.copy_size
    assert sizes.pp_size * sizes.dp_replicate_size * experts == world


@settings(max_examples=60)
@given(resolved_sizes(), st.sampled_from(["dp_replicate_size", "dp_shard_size"]))
def test_either_data_size_follows_from_the_others(sizes: ParallelSizes, name: str):
    assert replace(sizes, **{name: -1}).resolve(sizes.world_size) == sizes


@settings(max_examples=60)
@given(resolved_sizes(), st.integers(1, 600))
def test_other_numbers_of_ranks_are_one_error_with_the_numbers(sizes: ParallelSizes, world: int):
    if world == sizes.world_size:
        return
    (problem,) = sizes.problems(world)
    assert f"the {world} ranks" in problem.problem
    with pytest.raises(ConfigError, match=rf"does not make up the {world} ranks of this run"):
        sizes.resolve(world)


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (-1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (-1, 2, 8, (4, 2)),
        (2, 4, 8, (2, 4)),
        (-1, -1, 1, (1, 1)),
    ],
)
def test_sizes_fill_what_was_left_open(replicate: int, shard: int, world: int, expected: Any):
    sizes = ParallelSizes(replicate, shard).resolve(world)
    assert (sizes.dp_replicate_size, sizes.dp_shard_size) == expected


@pytest.mark.parametrize(
    ("replicate", "shard", "ranks", "expected"),
    [
        (-1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (-1, 2, 8, (4, 2)),
        (8, 1, 8, (8, 1)),
        (2, 2, 8, None),
        (3, -1, 8, None),
        (16, -1, 8, None),
    ],
)
def test_data_sizes_fit_or_do_not(replicate: int, shard: int, ranks: int, expected: Any):
    assert fit_data_sizes(replicate, shard, ranks=ranks) == expected


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        (ParallelSizes(dp_shard_size=3), 8, (f"{KEY}.dp_shard_size: dp_shard_size 3 does not make "
         "up the 8 ranks of this run. To fix: set dp_shard_size: -1, or choose sizes whose "
         "product is the number of ranks.")),
        (ParallelSizes(dp_replicate_size=2, dp_shard_size=2), 8, (f"{KEY}.dp_shard_size: "
         "dp_replicate_size 2 * dp_shard_size 2 = 4 does not make up the 8 ranks of this run.")),
        (ParallelSizes(ulysses_size=3), 8, (f"{KEY}.ulysses_size: ulysses_size 3 does not make up "
         "the 8 ranks of this run. To fix: choose sizes whose product divides the number of "
         "ranks.")),
        (ParallelSizes(pp_size=2, tp_size=3), 8, (f"{KEY}.pp_size: pp_size 2 * tp_size 3 = 6 does "
         "not make up the 8 ranks of this run.")),
        (ParallelSizes(dp_replicate_size=4, cp_size=4), 8, (f"{KEY}.dp_replicate_size: "
         "dp_replicate_size 4 * cp_size 4 = 16 does not make up the 8 ranks of this run.")),
        (ParallelSizes(dp_replicate_size=2, is_ddp=True, ulysses_size=2), 8,
         (f"{KEY}.dp_replicate_size: dp_replicate_size 2 * ulysses_size 2 = 4 does not make up the "
         "8 ranks of this run. To fix: leave dp_replicate_size out, or set it to 4.")),
        (ParallelSizes(ep_size=3), 8, (f"{KEY}.ep_size: 3 does not divide the 8 ranks that hold "
         "one copy of the model (dp_shard_size 8). To fix: set ep_size to one of 1, 2, 4, 8, or "
         "change the other sizes.")),
        (ParallelSizes(dp_replicate_size=2, ep_size=8, ulysses_size=2), 8, (f"{KEY}.ep_size: 8 "
         "does not divide the 4 ranks that hold one copy of the model (dp_shard_size 2 * "
         "ulysses_size 2 = 4).")),
        (ParallelSizes(dp_shard_size=1, ep_size=2), None, (f"{KEY}.ep_size: 2 does not divide the "
         "1 ranks that hold one copy of the model.")),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_the_numbers(sizes: ParallelSizes, world: int, message: str):
    (problem,) = sizes.problems(world)
    assert str(problem).startswith(message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (ParallelSizes(dp_shard_size=0), "dp_shard_size: 0 is neither -1 nor a positive number"),
        (ParallelSizes(dp_replicate_size=-2), "dp_replicate_size: -2 is neither -1 nor"),
        (ParallelSizes(tp_size=-1), "tp_size: -1 is not a positive number of ranks"),
        (ParallelSizes(ep_size=0), "ep_size: 0 is not a positive number of ranks"),
    ],
)
def test_numbers_that_count_no_ranks_are_refused(sizes: ParallelSizes, message: str):
    with pytest.raises(ConfigError, match=message):
        sizes.resolve(8)


def test_under_ddp_every_rank_holds_a_copy():
    config = AcceleratorConfig(fsdp_config=FSDPConfig(fsdp_mode="ddp"))
    sizes = ParallelSizes.of(config).resolve(8)
    assert (sizes.dp_replicate_size, sizes.dp_shard_size, sizes.data_size) == (8, 1, 8)
    assert (sizes.replicate_size, sizes.fsdp_size) == (8, 1)


def test_under_ddp_ranks_of_one_sequence_hold_copies_too():
    config = AcceleratorConfig(ulysses_size=2, fsdp_config=FSDPConfig(fsdp_mode="ddp"))
    sizes = ParallelSizes.of(config).resolve(8)
    assert (sizes.data_size, sizes.replicate_size, sizes.fsdp_size) == (4, 8, 1)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"dp_shard_size": 2}, (f"{KEY}.dp_shard_size: fsdp_mode: ddp gives each rank the whole "
         "model, so 2 ranks cannot share one. To fix: leave dp_shard_size out, or set fsdp_mode: "
         "fsdp2.")),
        ({"ep_size": 2}, (f"{KEY}.ep_size: fsdp_mode: ddp gives each rank all experts, so 2 ranks "
         "cannot split them. To fix: leave ep_size out, or set fsdp_mode: fsdp2.")),
    ],
)  # fmt: skip
def test_what_ddp_cannot_split_is_refused(over: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        ParallelSizes.of(AcceleratorConfig(**over, fsdp_config=FSDPConfig(fsdp_mode="ddp")))
    assert str(caught.value) == message


def test_every_size_of_the_configuration_is_taken():
    config = AcceleratorConfig(2, 3, 5, 7, ep_outside=True, pp_size=11, ulysses_size=13, cp_size=17)
    sizes = ParallelSizes(2, 3, 5, 7, ep_outside=True, pp_size=11, ulysses_size=13, cp_size=17)
    with pytest.raises(ConfigError, match=r"ep_size: 7 does not divide the 3315 ranks"):
        ParallelSizes.of(config)
    assert ParallelSizes.of(replace(config, ep_size=5)) == replace(sizes, ep_size=5)


def test_a_product_is_shown_with_its_value():
    assert describe([("pp_size", 2), ("tp_size", 4)]) == "pp_size 2 * tp_size 4 = 8"
    assert describe([("pp_size", 2)]) == "pp_size 2"
