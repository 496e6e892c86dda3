"""Give a sharded model its values, tensor by tensor: sent by the first rank, or each its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # pyright: ignore[reportPrivateUsage] - FSDP2's own

from omnilit.errors import OmniError
from omnilit.parallel.collectives import is_distributed, raise_together
from omnilit.parallel.local import local_part

END, FAILED = -1, -2  # what rank 0 sends in place of a tensor's number
MAX_LISTED = 8
Box: TypeAlias = tuple[slice, ...]  # a part of a tensor, a slice with both ends for each dim
Part: TypeAlias = tuple[slice | Tensor, ...]  # in place of a slice, positions of several pieces


class Values(Protocol):
    """The values of one tensor: the tensor itself, or what reads any part of it."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        ...

    def __getitem__(self, part: Part, /) -> Tensor:
        """A part of it, on any device and of any dtype."""
        ...


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones once, the non-persistent buffers included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def move_unsharded(model: nn.Module, device: torch.device) -> None:
    """Move all but the sharded parameters, which are offloaded, to `device`."""

    def move(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, DTensor) else tensor.to(device)

    model._apply(move)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as `to` does


def fill_parameter(parameter: Tensor, full: Values) -> None:
    """Copy this rank's part of `full` into `parameter`, without communication.

    Args:
        parameter: A tensor, or a DTensor with any sharded or replicated placements.
        full: The whole tensor.

    Raises:
        OmniError: The shapes differ.
    """
    if parameter.shape != full.shape:
        raise OmniError(f"cannot fill shape {list(parameter.shape)} from {list(full.shape)}")
    if (part := own_part(parameter)) is not None:
        copy_part(parameter, full[part])


def pieces(shape: Sequence[int], max_numel: int | None) -> Iterator[Box]:
    """Cut a tensor into parts that follow one another in memory.

    Args:
        shape: Of the whole tensor.
        max_numel: Elements of the largest part, at least 1; None for any number.

    Yields:
        Whole rows where one has at most so many elements, else rows of a row, and so on.
    """
    whole = tuple(slice(0, size) for size in shape)
    inner = math.prod(shape)
    if max_numel is None or inner <= max_numel:
        yield whole
        return
    dim = 0
    while (inner := inner // shape[dim]) > max_numel:
        dim += 1
    step = max_numel // inner
    for outer in product(*map(range, shape[:dim])):
        for start in range(0, shape[dim], step):
            cut = slice(start, min(start + step, shape[dim]))
            yield (*(slice(index, index + 1) for index in outer), cut, *whole[dim + 1 :])


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
    held = [[range(size)] for size in parameter.shape]
    place = parameter.device_mesh.get_coordinate()
    assert place is not None, "this rank is not in the parameter's mesh"
    for axis, placement in enumerate(parameter.placements):
        mine, size = place[axis], parameter.device_mesh.size(axis)
        if isinstance(placement, _StridedShard):
            blocks = _cut(held[placement.dim], int(placement.split_factor))
            held[placement.dim] = [run for block in blocks for run in _cut(block, size)[mine]]
        elif isinstance(placement, Shard):
            held[placement.dim] = _cut(held[placement.dim], size)[mine]
    if not all(any(map(len, runs)) for runs in held):  # a rank beyond the last row
        return None
    return tuple(map(_as_index, held))


def _cut(runs: Sequence[range], number: int) -> list[list[range]]:
    """As many parts as asked for, the last ones smaller or empty: torch's way to shard."""
    size = -(-sum(map(len, runs)) // number)
    parts: list[list[range]] = [[] for _ in range(number)]
    first = 0  # position of a run's first element among all
    for run in runs:
        for n, part in enumerate(parts):
            start, stop = max(n * size - first, 0), max((n + 1) * size - first, 0)
            if own := run[start:stop]:
                part.append(own)
        first += len(run)
    return parts


def _as_index(runs: Sequence[range]) -> slice | Tensor:
    first, last = runs[0].start, runs[-1].stop
    if last - first == sum(map(len, runs)):
        return slice(first, last)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


def copy_part(parameter: Tensor, part: Tensor) -> None:
    """Write this rank's part of a tensor, on any device and of any dtype.

    Args:
        parameter: Not on the meta device.
        part: What `own_part` cuts out of the whole.
    """
    with torch.no_grad():
        local_part(parameter).copy_(part)


def copy_overlap(parameter: Tensor, piece: Tensor, box: Box) -> None:
    """Write what this rank holds of a piece of a tensor.

    Args:
        parameter: One on the meta device, which is another stage's, gets nothing.
        piece: Values, on any device and of any dtype.
        box: Where in the whole tensor they are.
    """
    if parameter.is_meta or (own := own_part(parameter)) is None:
        return
    overlaps = [_overlap(held, cut) for held, cut in zip(own, box, strict=True)]
    with torch.no_grad():
        local = local_part(parameter)
        for runs in product(*overlaps):
            to, of = (tuple(run[side] for run in runs) for side in (0, 1))
            local[to].copy_(piece[of])  # views alone: positions would copy the piece once more


def _overlap(own: slice | Tensor, cut: slice) -> list[tuple[slice, slice]]:
    """What one dimension of a part and of a box share, counted from the start of each, by runs."""
    if isinstance(own, Tensor):
        (places,) = ((own >= cut.start) & (own < cut.stop)).nonzero(as_tuple=True)
        ends = ((own[places].diff() != 1).nonzero()[:, 0] + 1).tolist()
        runs = places.tensor_split(ends) if len(places) else ()
        firsts = [(int(run[0]), int(own[run[0]]) - cut.start, len(run)) for run in runs]
        return [(slice(to, to + n), slice(of, of + n)) for to, of, n in firsts]
    start, stop = max(own.start, cut.start), min(own.stop, cut.stop)
    to, of = (slice(start - first, stop - first) for first in (own.start, cut.start))
    return [(to, of)] if start < stop else []


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Values]],
    *,
    device: torch.device,
    names: Iterable[str] | None = None,
    from_rank0: bool = True,
    max_bytes: int | None = None,
    whole: Mapping[str, Tensor] = MappingProxyType({}),
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
        max_bytes: What is sent of a tensor at a time, so that no rank but the first needs memory
            for more beside its own part; None for all of it.
        whole: The tensors of the whole model, on the meta device, where `model` is a stage of it:
            what rank 0 sends beside those of `model` is for other ranks.

    Raises:
        OmniError: A name is unknown, comes twice or is missing, or a shape differs.
    """
    known = {**whole, **named_tensors(model)}
    names = list(known if names is None else names)
    if not from_rank0:
        _fill_alone(known, names, tensors)
        return
    wire = _Wire(device, max_bytes)
    if is_distributed() and dist.get_rank() != 0:
        wire.receive(known, names)
    else:
        wire.send(known, names, tensors)


def _fill_alone(
    known: dict[str, Tensor], names: list[str], tensors: Iterable[tuple[str, Values]]
) -> None:
    error: BaseException | None = None
    try:
        for _, name, full in _checked(known, names, tensors):
            fill_parameter(known[name], full)
    except BaseException as caught:  # the others come to the same agreement
        error = caught
    raise_together(error)


def _checked(
    known: dict[str, Tensor], names: list[str], tensors: Iterable[tuple[str, Values]]
) -> Iterator[tuple[int, str, Values]]:
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


class _Wire:
    """How rank 0 sends: before each piece the number of its tensor, then its values.

    Args:
        device: Where the backend of the process group works.
        max_bytes: Size of the largest piece; None for whole tensors.
    """

    def __init__(self, device: torch.device, max_bytes: int | None) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self._received = torch.empty(0, dtype=torch.uint8, device=device)

    def send(
        self, known: dict[str, Tensor], names: list[str], tensors: Iterable[tuple[str, Values]]
    ) -> None:
        """Send all values, or that there was an error, and fill this rank's own parts."""
        try:
            for index, name, full in _checked(known, names, tensors):
                parameter = known[name]
                for box in self._cut(parameter):
                    piece = full[box].detach()  # an error in reading comes before the number
                    piece = piece.to(device=self.device, dtype=parameter.dtype).contiguous()
                    self._announce(index)
                    self._pass_on(piece)
                    copy_overlap(parameter, piece, box)
        except BaseException as error:  # the others wait for the next piece: tell them first
            self._announce(FAILED)
            raise_together(error)
            raise
        self._announce(END)

    def receive(self, known: dict[str, Tensor], names: list[str]) -> None:
        """Fill this rank's parts with what rank 0 sends.

        Raises:
            OmniError: Rank 0 has failed.
        """
        current, boxes = END, iter(())
        while (index := self._announce(0)) not in (END, FAILED):
            parameter = known[names[index]]
            if index != current:
                current, boxes = index, self._cut(parameter)
            box = next(boxes)
            piece = self._room([cut.stop - cut.start for cut in box], parameter.dtype)
            self._pass_on(piece)
            copy_overlap(parameter, piece, box)
        if index == FAILED:
            raise_together(None)

    def _cut(self, parameter: Tensor) -> Iterator[Box]:
        if self.max_bytes is None:
            return pieces(parameter.shape, None)
        return pieces(parameter.shape, max(self.max_bytes // parameter.element_size(), 1))

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a piece, the same for all: the backend lets go of its own only later."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._received.numel() < num_bytes:
            self._received = self._received.new_empty(0)  # not two at a time
            self._received = self._received.new_empty(num_bytes)
        return self._received[:num_bytes].view(dtype).view(list(shape))

    def _announce(self, number: int) -> int:
        """Rank 0's `number` on every rank: whose piece comes next, or that none does."""
        sent = torch.tensor(number, dtype=torch.int64, device=self.device)
        self._pass_on(sent)
        return int(sent)

    @staticmethod
    def _pass_on(values: Tensor) -> None:
        """Make rank 0's values those of all; the identity in a single process."""
        if is_distributed() and dist.get_world_size() > 1:
            dist.broadcast(values, src=0)
