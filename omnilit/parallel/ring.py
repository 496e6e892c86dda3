"""A ring of ranks in which each hands a tensor to the next while it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


@dataclass(frozen=True, slots=True)
class Passing:
    """A tensor on its way to the next rank, and another one coming from the rank before.

    Args:
        sent: Not to be changed before `wait`.
        received: Undefined before `wait`.
        works: What is under way.
    """

    sent: Tensor
    received: Tensor
    works: list[Work]

    def wait(self) -> Tensor:
        """What came from the rank before."""
        for work in self.works:
            work.wait()
        return self.received


def pass_on(tensor: Tensor, group: ProcessGroup, *, tag: int = 0) -> Passing:
    """Begin to hand a tensor to the next rank; all ranks call alike, with equal shapes.

    Args:
        tensor: Contiguous, since gloo sends nothing else.
        group: The ring, in order.
        tag: Tells apart what is under way at the same time.
    """
    rank, size = group.rank(), group.size()
    received = torch.empty_like(tensor)
    operations = [
        dist.P2POp(dist.isend, tensor, group=group, tag=tag, group_peer=(rank + 1) % size),
        dist.P2POp(dist.irecv, received, group=group, tag=tag, group_peer=(rank - 1) % size),
    ]
    return Passing(tensor, received, dist.batch_isend_irecv(operations))
