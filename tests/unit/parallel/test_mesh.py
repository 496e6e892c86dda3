import pytest

from omnilit.config import AcceleratorConfig, FSDPConfig
from omnilit.errors import ConfigError
from omnilit.parallel.mesh import ParallelSizes


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
def test_sizes_fill_what_was_left_open(replicate, shard, world, expected):
    sizes = ParallelSizes(replicate, shard).resolve(world)
    assert (sizes.dp_replicate_size, sizes.dp_shard_size) == expected


@pytest.mark.parametrize(("replicate", "shard"), [(3, -1), (-1, 3), (2, 2), (4, 4)])
def test_sizes_that_do_not_fit_name_the_numbers(replicate, shard):
    with pytest.raises(ConfigError, match=r"does not make up the 8 ranks.*dp_shard_size: -1"):
        ParallelSizes(replicate, shard).resolve(8)


def test_a_size_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"dp_shard_size: 0 is neither -1 nor"):
        ParallelSizes(-1, 0).resolve(8)


def test_under_ddp_every_rank_holds_a_copy():
    config = AcceleratorConfig(fsdp_config=FSDPConfig(fsdp_mode="ddp"))
    sizes = ParallelSizes.of(config).resolve(8)
    assert (sizes.dp_replicate_size, sizes.dp_shard_size, sizes.data_size) == (8, 1, 8)


def test_ddp_that_is_to_shard_is_refused():
    config = AcceleratorConfig(fsdp_config=FSDPConfig(fsdp_mode="ddp"), dp_shard_size=2)
    with pytest.raises(ConfigError, match=r"dp_shard_size: fsdp_mode: ddp shards nothing, and 2"):
        ParallelSizes.of(config)
