"""Give a sharded model its values, tensor by tensor: sent by the first rank, or each its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportPrivateUsage] - FSDP2's own

from omnilit.errors import OmniError
from omnilit.parallel.collectives import is_distributed, raise_together

END, FAILED = -1, -2  # what rank 0 sends in place of a tensor's number
MAX_LISTED = 8
Part: TypeAlias = tuple[slice | Tensor, ...]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones once, the non-persistent buffers included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fill_parameter(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full` into `parameter`, without communication.

    Args:
        parameter: A tensor, or a DTensor with any sharded or replicated placements.
        full: The whole tensor, on any device and of any dtype.

    Raises:
        OmniError: The shapes differ.
    """
    if parameter.shape != full.shape:
        raise OmniError(f"cannot fill shape {list(parameter.shape)} from {list(full.shape)}")
    if (part := own_part(parameter)) is not None:
        copy_part(parameter, full[part])


def own_part(parameter: Tensor) -> Part | None:
    """Which part of the whole tensor this rank holds; None for a rank that holds nothing.

    Args:
        parameter: A tensor, or a DTensor with any sharded or replicated placements.

    Returns:
        What to index the whole tensor with, one item a dimension: a slice or, where the part is
        not of one piece, as of joined matrices that are each split, all positions.
    """
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    whole = [torch.arange(size) for size in parameter.shape]
    place = parameter.device_mesh.get_coordinate()
    assert place is not None, "this rank is not in the parameter's mesh"
    for axis, placement in enumerate(parameter.placements):
        size = parameter.device_mesh.size(axis)
        if isinstance(placement, _StridedShard):
            blocks = _cut(whole[placement.dim], int(placement.split_factor))
            own = torch.cat([_cut(block, size)[place[axis]] for block in blocks])
            whole[placement.dim] = own
        elif isinstance(placement, Shard):
            whole[placement.dim] = _cut(whole[placement.dim], size)[place[axis]]
    if not all(map(len, whole)):  # a rank beyond the last row
        return None
    return tuple(map(_as_slice, whole))


def _cut(positions: Tensor, number: int) -> list[Tensor]:
    """As many parts as asked for, the last ones smaller or empty: torch's way to shard."""
    size = -(-len(positions) // number)
    return [positions[n * size : (n + 1) * size] for n in range(number)]


def _as_slice(positions: Tensor) -> slice | Tensor:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def copy_part(parameter: Tensor, part: Tensor) -> None:
    """Write this rank's part of a tensor, on any device and of any dtype.

    Args:
        parameter: Not on the meta device.
        part: What `own_part` cuts out of the whole.
    """
    with torch.no_grad():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(part)


def broadcast_from_first(
    tensor: Tensor | None, *, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Hand rank 0's `tensor` to every rank; the identity in a single process.

    Args:
        tensor: The values on rank 0; not looked at elsewhere.
        shape: Its shape, known on every rank.
        dtype: The type to send it in.
        device: Where the backend of the process group works.
    """
    if not is_distributed() or dist.get_rank() == 0:
        assert tensor is not None, "rank 0 holds the values"
        buffer = tensor.detach().to(device=device, dtype=dtype).contiguous()
    else:
        buffer = torch.empty(shape, dtype=dtype, device=device)
    if is_distributed() and dist.get_world_size() > 1:
        dist.broadcast(buffer, src=0)
    return buffer


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device,
    names: Iterable[str] | None = None,
    from_rank0: bool = True,
) -> None:
    """Fill tensors of `model`, each exactly once, on all ranks; every rank must call.

    Args:
        model: No tensor of it that is to be filled is on the meta device.
        tensors: Names and full values, perhaps made or read one at a time. An error on the way
            is raised on every rank.
        device: Where the backend of the process group works.
        names: What must be filled; default: all of `named_tensors`.
        from_rank0: Only rank 0 iterates and sends the values; otherwise every rank iterates, over
            equal values, and keeps its parts without sending anything.

    Raises:
        OmniError: A name is unknown, comes twice or is missing, or a shape differs.
    """
    known = named_tensors(model)
    open_names = list(known if names is None else names)
    if not from_rank0:
        _fill_alone(known, open_names, tensors)
    elif is_distributed() and dist.get_rank() != 0:
        _receive(known, open_names, device)
    else:
        _send(known, open_names, tensors, device)


def _fill_alone(
    known: dict[str, Tensor], names: list[str], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    error: BaseException | None = None
    try:
        for _, name, full in _checked(known, names, tensors):
            fill_parameter(known[name], full)
    except BaseException as caught:  # the others come to the same agreement
        error = caught
    raise_together(error)


def _send(
    known: dict[str, Tensor],
    names: list[str],
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
) -> None:
    try:
        for index, name, full in _checked(known, names, tensors):
            _announce(index, device)
            _fill_one(known[name], full, device)
    except BaseException as error:  # the others wait for the next tensor: tell them first
        _announce(FAILED, device)
        raise_together(error)
        raise
    _announce(END, device)


def _checked(
    known: dict[str, Tensor], names: list[str], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[int, str, Tensor]]:
    waiting = {name: index for index, name in enumerate(names)}
    for name, full in tensors:
        if name not in waiting:
            raise OmniError(f"{name} is not a tensor that is to be filled, or it came twice")
        if known[name].shape != full.shape:
            wanted, found = list(known[name].shape), list(full.shape)
            raise OmniError(f"{name} has the shape {wanted} and cannot be filled from {found}")
        yield waiting.pop(name), name, full
    if waiting:
        listed = ", ".join(list(waiting)[:MAX_LISTED])
        raise OmniError(f"{len(waiting)} tensors of the model got no value: {listed}")


def _receive(known: dict[str, Tensor], names: list[str], device: torch.device) -> None:
    while (index := _announce(0, device)) not in (END, FAILED):
        _fill_one(known[names[index]], None, device)
    if index == FAILED:
        raise_together(None)


def _announce(number: int, device: torch.device) -> int:
    """Rank 0's `number` on every rank: which tensor comes next, or that none does."""
    sent = torch.tensor(number, dtype=torch.int64)
    return int(broadcast_from_first(sent, shape=sent.shape, dtype=sent.dtype, device=device))


def _fill_one(parameter: Tensor, full: Tensor | None, device: torch.device) -> None:
    shape, dtype = parameter.shape, parameter.dtype
    fill_parameter(parameter, broadcast_from_first(full, shape=shape, dtype=dtype, device=device))
