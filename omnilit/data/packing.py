"""Which samples share a micro-batch: plans of one pass, pure in their arguments."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the lengths and the number of the pass.

    Args:
        seed: Of the shuffling.
        budget: Tokens that a micro-batch may hold.
        buffer_size: None packs the whole pass by best fit; a number packs in shuffled order
            by first fit, from a buffer of at least so many samples.
    """

    seed: int
    budget: int
    buffer_size: int | None = None


class PassPlan(NamedTuple):
    """The micro-batches of one trip through the data, in order.

    Args:
        samples: Indices of all samples, micro-batch by micro-batch; int64 [n].
        bounds: Micro-batch b holds samples[bounds[b]:bounds[b + 1]]; int64 [b + 1].
    """

    samples: Ints
    bounds: Ints

    @property
    def size(self) -> int:
        """Number of micro-batches."""
        return len(self.bounds) - 1

    def get(self, index: int) -> list[int]:
        """The samples of micro-batch `index`; none beyond the last one."""
        if index >= self.size:
            return []
        return self.samples[self.bounds[index] : self.bounds[index + 1]].tolist()


def plan_pass(lengths: npt.NDArray[np.int32], settings: PlanSettings, pass_index: int) -> PassPlan:
    """The micro-batches of pass `pass_index`, shuffled anew for every pass.

    Args:
        lengths: Tokens of each sample, none above the budget; [n].
        settings: Seed, budget and the way of packing.
        pass_index: 0-based trip through the data.
    """
    sequence = np.random.SeedSequence([settings.seed, pass_index])
    rng = np.random.Generator(np.random.Philox(sequence))
    order = rng.permutation(len(lengths))
    if settings.buffer_size is None:
        plan = best_fit(lengths, order, budget=settings.budget)
    else:
        plan = first_fit_buffered(
            lengths, order, budget=settings.budget, buffer_size=settings.buffer_size
        )
    return _reorder(plan, rng.permutation(plan.size))


def best_fit(lengths: npt.NDArray[np.int32], order: Ints, *, budget: int) -> PassPlan:
    """Best fit, longest samples first, ties in `order`: each goes where it leaves least room.

    Samples of one length are placed together, so that the work beside sorting grows with the
    number of different lengths. The number of micro-batches depends on the lengths alone.

    Args:
        lengths: Tokens of each sample, 1 to `budget`; [n].
        order: A permutation of the samples; [n].
        budget: Tokens that a micro-batch may hold.
    """
    assert lengths.min() > 0
    assert lengths.max() <= budget
    placed = order[np.argsort(-lengths[order].astype(np.int64), kind="stable")]
    sizes, counts = np.unique(-lengths[placed].astype(np.int64), return_counts=True)
    bin_of = np.empty(len(placed), dtype=np.int64)
    room = _Room()
    start = 0
    for size, total in zip((-sizes).tolist(), counts.tolist(), strict=True):
        count = total
        while count:
            bins, left = room.take(size, budget, count)
            each = left // size
            taken = min(count, each * len(bins))
            bin_of[start : start + taken] = np.repeat(bins, each)[:taken]
            full, rest = divmod(taken, each)
            room.put(left - each * size, bins[:full])
            if rest:
                room.put(left - rest * size, bins[full : full + 1])
            room.put(left, bins[full + bool(rest) :])
            start, count = start + taken, count - taken
    grouped = np.argsort(bin_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])
    return PassPlan(placed[grouped], bounds)


def first_fit_buffered(
    lengths: npt.NDArray[np.int32], order: Ints, *, budget: int, buffer_size: int
) -> PassPlan:
    """First fit from a buffer of samples in order, as the reference packs.

    Once the buffer holds `buffer_size` samples and a budget of tokens, a micro-batch is taken
    from it: in order, every sample that still fits; the first always does. What remains at the
    end of the pass is packed likewise.

    Args:
        lengths: Tokens of each sample, at most `budget`; [n].
        order: The samples in the order of the pass; [n].
        budget: Tokens that a micro-batch may hold.
        buffer_size: Samples that the buffer holds before it is packed from.
    """
    bins: list[list[int]] = []
    buffer: list[tuple[int, int]] = []
    tokens = 0

    def pack() -> int:
        picked, rest, room = [], [], budget
        for place, (sample, size) in enumerate(buffer):
            if not room:
                rest.extend(buffer[place:])
                break
            if size <= room:
                picked.append(sample)
                room -= size
            else:
                rest.append((sample, size))
        buffer[:] = rest
        bins.append(picked)
        return budget - room

    for sample, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if len(buffer) >= buffer_size and tokens >= budget:
            tokens -= pack()
        buffer.append((sample, size))
        tokens += size
    while buffer:
        pack()
    return from_bins(bins)


def from_bins(bins: list[list[int]]) -> PassPlan:
    """A plan of the given micro-batches."""
    sizes = [len(members) for members in bins]
    flat = [sample for members in bins for sample in members]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return PassPlan(np.asarray(flat, dtype=np.int64), bounds)


class _Room:
    """Micro-batches by the tokens that they still have room for."""

    def __init__(self) -> None:
        self._bins: dict[int, list[Ints]] = {}
        self._rooms: list[int] = []
        self._num_bins = 0

    def take(self, size: int, budget: int, count: int) -> tuple[Ints, int]:
        """Take out all micro-batches of the least room of at least `size`, or make new ones.

        New ones are as many as `count` samples of `size` fill.
        """
        place = bisect_left(self._rooms, size)
        if place < len(self._rooms):
            room = self._rooms.pop(place)
            return np.concatenate(self._bins.pop(room)), room
        num_new = -(-count // (budget // size))
        self._num_bins += num_new
        return np.arange(self._num_bins - num_new, self._num_bins), budget

    def put(self, room: int, bins: Ints) -> None:
        """Put micro-batches back with `room` left; those without room are done."""
        if not room or not len(bins):
            return
        if room not in self._bins:
            insort(self._rooms, room)
        self._bins.setdefault(room, []).append(bins)


def _reorder(plan: PassPlan, order: Ints) -> PassPlan:
    sizes = np.diff(plan.bounds)[order]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    # Position p of the new plan belongs to new micro-batch b and reads from its old place.
    shift = np.repeat(plan.bounds[:-1][order] - bounds[:-1], sizes)
    return PassPlan(plan.samples[np.arange(len(plan.samples)) + shift], bounds)
