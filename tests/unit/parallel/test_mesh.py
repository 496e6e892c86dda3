import pytest

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
