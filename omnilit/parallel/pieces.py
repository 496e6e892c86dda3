"""DTensors whose parts lie in no simple order: those of matrices that are split, then sharded.

Of joined matrices that are each split, a rank holds several pieces. Torch's checkpoints know one
piece a rank, given by where it begins, and would store the others in places that are not theirs.
So such tensors change, on their way out and in, to a layout that has one piece a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportPrivateUsage] - FSDP2's own

_TORCH_LOG: Final = logging.getLogger("torch.distributed.tensor._redistribute")


def is_in_pieces(tensor: Tensor) -> bool:
    """Whether some rank's part of `tensor` is not one block of it; the same on every rank."""
    if not isinstance(tensor, DTensor):
        return False
    for axis, placement in enumerate(tensor.placements):
        rest = tensor.placements[axis + 1 :]
        if isinstance(placement, _StridedShard) and not any(
            # What FSDP2 has cut, a further cut of the same dimension makes whole
            isinstance(other, Shard) and other.dim == placement.dim
            for other in rest
        ):
            return True
    return False


def in_one_piece(tensor: Tensor) -> Tensor:
    """The same values with one block a rank; the tensor itself where it has one; ranks all call."""
    if not isinstance(tensor, DTensor) or not is_in_pieces(tensor):
        return tensor
    placements = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
    return _redistribute(tensor, placements)


def take_from_one_piece(tensor: Tensor, moved: Tensor) -> None:
    """Write into `tensor` what `in_one_piece` made of it, or what that was changed to since."""
    if moved is tensor:
        return
    assert isinstance(tensor, DTensor)
    assert isinstance(moved, DTensor)
    with torch.no_grad():
        back = _redistribute(moved, tensor.placements)
        tensor.to_local().copy_(back.to_local())


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not; every rank calls."""
    if not isinstance(tensor, DTensor):
        return tensor
    level = _TORCH_LOG.level
    _TORCH_LOG.setLevel(logging.ERROR)  # else it advises against two gathers on every rank
    try:
        return _on_device(tensor).full_tensor()
    finally:
        _TORCH_LOG.setLevel(level)


def _redistribute(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    moved = _on_device(tensor).redistribute(placements=placements).to(tensor.device)
    assert isinstance(moved, DTensor)
    return moved


def _on_device(tensor: DTensor) -> DTensor:
    """The tensor where the backend of its mesh works: an offloaded one is elsewhere."""
    moved = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(moved, DTensor)
    return moved
