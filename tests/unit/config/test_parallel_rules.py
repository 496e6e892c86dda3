"""How a model may be spread, judged before it is."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config import AcceleratorConfig, FSDPConfig
from omnilit.config.parallel_rules import (
    ACCELERATOR,
    CHUNK,
    EXPERTS,
    FROM_RANK0,
    FSDP,
    FSDP2_ONLY,
    KEPT,
    MIXED,
    MODE,
    MOVED,
    OUTSIDE,
    REPLICATE,
    SHARD,
    ULYSSES,
    sizes_of,
)
from omnilit.config.schema import Field
from omnilit.config.view import View
from omnilit.parallel.mesh import ParallelSizes
from tests.helpers.rules import problems

TP, PP = f"{ACCELERATOR}.tp_size", f"{ACCELERATOR}.pp_size"
ASYNC = f"{ACCELERATOR}.enable_async"
BATCH = "train.global_batch_size"
CP = f"{ACCELERATOR}.cp_size"
RECOMPUTE = "train.gradient_checkpointing"
EACH = f"{FSDP}.sync_each_micro_batch"
DEFAULTS = {**dict.fromkeys(FSDP2_ONLY, True), f"{MIXED}.output_dtype": None, EACH: False}
OTHERS = {**dict.fromkeys(FSDP2_ONLY, False), f"{MIXED}.output_dtype": "float32", EACH: True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({SHARD: 3}, (f"{SHARD}: dp_shard_size 3 does not make up the 4 ranks of this run. To fix: "
         "set dp_shard_size: -1, or choose sizes whose product is the number of ranks.")),
        ({REPLICATE: 3}, f"{REPLICATE}: dp_replicate_size 3 does not make up the 4 ranks"),
        ({REPLICATE: 2, SHARD: 4}, (f"{SHARD}: dp_replicate_size 2 * dp_shard_size 4 = 8 does not "
         "make up the 4 ranks of this run.")),
        ({MODE: "ddp", REPLICATE: 2}, (f"{REPLICATE}: dp_replicate_size 2 does not make up the "
         "4 ranks of this run. To fix: leave dp_replicate_size out, or set it to 4.")),
    ],
)  # fmt: skip
def test_sizes_that_are_not_the_ranks_are_refused_once_those_are_known(
    given: dict[str, Any], message: str, fields: list[Field]
):
    (problem,) = problems(fields, given, world_size=4)
    assert problem.startswith(message)
    assert not problems(fields, given)


@pytest.mark.parametrize(
    "given",
    [
        {SHARD: 1},
        {REPLICATE: 2},
        {REPLICATE: 2, SHARD: 2},
        {REPLICATE: 4, SHARD: -1},
        {MODE: "ddp"},
        {MODE: "ddp", REPLICATE: 4, SHARD: 1},
        {MODE: "ddp", MIXED + ".enable": False, MIXED + ".reduce_dtype": "bfloat16"},
        {MODE: "ddp", **DEFAULTS},
        OTHERS,
        {f"{FSDP}.offload": True, CHUNK: 0.5, MOVED: True, KEPT: 2.5},
        {MODE: "ddp", f"{FSDP}.offload": True},
        {FROM_RANK0: False, CHUNK: 20.0, MOVED: False, KEPT: 0.0},
        {f"{RECOMPUTE}.debug": True},
        {f"{RECOMPUTE}.enable_reentrant": True},
        {
            f"{RECOMPUTE}.enable": False,
            f"{RECOMPUTE}.debug": True,
            f"{RECOMPUTE}.enable_reentrant": True,
        },
        {"train.global_batch_size": 8, REPLICATE: 2},
    ],
)
def test_layouts_that_fit_four_ranks_are_good(given: dict[str, Any], fields: list[Field]):
    assert not problems(fields, given, world_size=4)


@pytest.mark.parametrize(
    "given",
    [
        {ULYSSES: 2, CP: 2},
        {ULYSSES: 2, ASYNC: True},
        {EXPERTS: 2, OUTSIDE: True},
        {EXPERTS: 4, TP: 2, REPLICATE: 1},
        {PP: 2, TP: 2, MODE: "ddp", BATCH: 2},
        {MODE: "ddp", ULYSSES: 2, REPLICATE: 2},
        {ULYSSES: 2, BATCH: 2},
        {OUTSIDE: False, ASYNC: False},
    ],
)
def test_axes_that_fit_four_ranks_are_good(given: dict[str, Any], fields: list[Field]):
    assert not problems(fields, given, world_size=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({ULYSSES: 3}, (f"{ULYSSES}: ulysses_size 3 does not make up the 4 ranks of this run. "
         "To fix: choose sizes whose product divides the number of ranks.")),
        ({PP: 2, CP: 2, SHARD: 2}, (f"{SHARD}: dp_shard_size 2 * pp_size 2 * cp_size 2 = 8 does "
         "not make up the 4 ranks of this run. To fix: set dp_shard_size: -1, or choose sizes "
         "whose product is the number of ranks.")),
        ({EXPERTS: 4, REPLICATE: 2}, (f"{EXPERTS}: 4 does not divide the 2 ranks that hold one "
         "copy of the model (dp_shard_size 2). To fix: set ep_size to one of 1, 2, or change the "
         "other sizes.")),
        ({EXPERTS: 2, MODE: "ddp"}, (f"{EXPERTS}: fsdp_mode: ddp gives each rank all experts, so "
         "2 ranks cannot split them. To fix: leave ep_size out, or set fsdp_mode: fsdp2.")),
        ({OUTSIDE: True}, (f"{OUTSIDE}: true has no effect, because ep_size is 1. To fix: leave "
         "it out, or set ep_size above 1.")),
        ({ASYNC: True}, (f"{ASYNC}: true has no effect, because ulysses_size is 1. To fix: leave "
         "it out, or set ulysses_size above 1.")),
        ({TP: 0}, f"{TP}: 0 is out of range. To fix: use a number at least 1."),
        ({PP: -1}, f"{PP}: -1 is out of range. To fix: use a number at least 1."),
        ({ULYSSES: 2, BATCH: 3}, (f"{BATCH}: 3 is not a multiple of micro_batch_size 1 * 2 "
         "data-parallel ranks. To fix: use a multiple of 2, such as 2.")),
    ],
)  # fmt: skip
def test_axes_that_do_not_fit_four_ranks_are_one_problem(
    given: dict[str, Any], message: str, fields: list[Field]
):
    assert problems(fields, given, world_size=4) == [message]


def test_ddp_shards_nothing(fields: list[Field]):
    (problem,) = problems(fields, {MODE: "ddp", SHARD: 4}, world_size=4)
    assert problem == (
        f"{SHARD}: fsdp_mode: ddp gives each rank the whole model, so 4 ranks cannot share one. "
        "To fix: leave dp_shard_size out, or set fsdp_mode: fsdp2."
    )


@pytest.mark.parametrize("path", FSDP2_ONLY)
def test_what_only_sharded_parameters_have_is_refused_under_ddp(path: str, fields: list[Field]):
    value = OTHERS[path]
    shown = str(value).lower() if isinstance(value, bool) else value
    (problem,) = problems(fields, {MODE: "ddp", path: value})
    assert problem == (
        f"{path}: {shown} has no effect, because fsdp_mode: ddp neither shards nor gathers "
        "parameters. To fix: leave it out, or set fsdp_mode: fsdp2."
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({FROM_RANK0: False, CHUNK: 5.0}, (f"{CHUNK}: 5.0 has no effect, because {FROM_RANK0}: "
         "false sends no tensor. To fix: leave it out, or let rank 0 send the weights.")),
        ({CHUNK: 0.0}, f"{CHUNK}: 0.0 is out of range. To fix: use a number above 0."),
        ({KEPT: 5.0}, (f"{KEPT}: 5.0 has no effect, because enable_activation: false moves no "
         "activation. To fix: leave it out, or set enable_activation: true.")),
        ({MOVED: True, KEPT: -1.0}, (f"{KEPT}: -1.0 is out of range. To fix: use a number at least "
         "0.")),
    ],
)  # fmt: skip
def test_sizes_of_memory_bound_something(given: dict[str, Any], message: str, fields: list[Field]):
    assert problems(fields, given) == [message]


def test_reentrant_recomputation_has_nothing_to_debug(fields: list[Field]):
    given = {f"{RECOMPUTE}.debug": True, f"{RECOMPUTE}.enable_reentrant": True}
    (problem,) = problems(fields, given)
    assert problem == (
        f"{RECOMPUTE}.debug: enable_reentrant: true recomputes without comparing, so there is "
        "nothing to record. To fix: set enable_reentrant: false, or leave debug out."
    )


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        (AcceleratorConfig(), 4),
        (AcceleratorConfig(dp_replicate_size=2), 4),
        (AcceleratorConfig(ep_size=2, ep_outside=True), 4),
        (AcceleratorConfig(fsdp_config=FSDPConfig(fsdp_mode="ddp")), 4),
        (AcceleratorConfig(fsdp_config=FSDPConfig(fsdp_mode="ddp"), dp_shard_size=1), 2),
    ],
)
def test_what_the_rules_pass_the_meshes_take(
    config: AcceleratorConfig, ranks: int, fields: list[Field]
):
    given = {
        REPLICATE: config.dp_replicate_size,
        SHARD: config.dp_shard_size,
        EXPERTS: config.ep_size,
        OUTSIDE: config.ep_outside,
        MODE: config.fsdp_config.fsdp_mode,
    }
    assert not problems(fields, given, world_size=ranks)
    sizes = ParallelSizes.of(config).resolve(ranks)
    assert sizes.data_size == ranks
    assert sizes_of(View({field.path: field for field in fields}, given)).resolve(ranks) == sizes
    assert (sizes.dp_shard_size == 1) == (given[MODE] == "ddp")
