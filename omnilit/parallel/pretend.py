"""One process as one rank of many that are not there, to build and count what it would hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def pretend_ranks(world_size: int, *, rank: int) -> Iterator[None]:
    """A default process group of ranks that do not exist; collectives return at once, with nothing.

    Meshes are cut and models sharded as on the real ranks; values mean nothing, so keep to the
    meta device.

    Args:
        world_size: All ranks.
        rank: Which of them this process is.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
