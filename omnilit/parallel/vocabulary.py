"""A head whose rows are spread over ranks: what they tell each other instead of their logits."""

# R supervised rows, D hidden size

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class VocabularyShards:
    """Equal parts of a vocabulary, one a rank; the kernel of the head's loss joins them by it.

    Args:
        group: The ranks, in the order of their parts; all must call with the same rows.
        first: The token id of this rank's first row.
    """

    group: ProcessGroup
    first: int

    @classmethod
    def of(cls, weight_VD: DTensor) -> VocabularyShards:
        """The parts of a weight that is sharded by rows, and evenly, over a mesh of one axis."""
        mesh = weight_VD.device_mesh
        rows = weight_VD.shape[0] // mesh.size()
        return cls(mesh.get_group(), mesh.get_local_rank() * rows)

    def join(self, norms_R: Tensor, picked_R: Tensor) -> tuple[Tensor, Tensor]:
        """Log-normalisers over the whole vocabulary, and every target's logit; float32 both."""
        largest_R = norms_R.clone()
        dist.all_reduce(largest_R, dist.ReduceOp.MAX, group=self.group)
        sums_2R = torch.stack([(norms_R - largest_R).exp(), picked_R])
        dist.all_reduce(sums_2R, group=self.group)
        return largest_R + sums_2R[0].log(), sums_2R[1]

    def sum(self, grad_RD: Tensor) -> Tensor:
        """The sum of all ranks' gradients."""
        grad_RD = grad_RD.contiguous()
        dist.all_reduce(grad_RD, group=self.group)
        return grad_RD
