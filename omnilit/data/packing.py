"""Which samples share a micro-batch: plans of one pass, pure in their arguments."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from omnilit.data.warmup import BudgetSchedule

Ints = npt.NDArray[np.int64]
T = TypeVar("T")
CHUNK = 65_536  # samples that are turned into Python numbers at a time


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the lengths and the number of the pass.

    Args:
        seed: Of the shuffling.
        budget: Tokens that a micro-batch may hold.
        buffer_size: None packs the whole pass by best fit; a number packs in shuffled order
            by first fit, from a buffer of at least so many samples.
        samples_per_item: Given, a micro-batch is so many samples, whatever their length.
        drop_last: Leave out the last window of a pass where it is not full, be it that samples
            are missing in its last micro-batch or whole micro-batches.
    """

    seed: int
    budget: BudgetSchedule
    buffer_size: int | None = None
    samples_per_item: int | None = None
    drop_last: bool = False


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


def make_generator(seed: int, pass_index: int) -> np.random.Generator:
    """The random numbers of a pass."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, pass_index])))


def plan_pass(
    lengths: npt.NDArray[np.int32],
    order: Ints,
    settings: PlanSettings,
    rng: np.random.Generator,
    *,
    first_item: int = 0,
) -> PassPlan:
    """The micro-batches of one pass.

    While the budget warms up, samples are packed in their order, and the micro-batches keep
    theirs; a sample longer than the small budget is a micro-batch of its own.

    Args:
        lengths: Tokens of each sample, none above the full budget; [n].
        order: The samples of the pass, shuffled; one may come more than once.
        settings: Budget and way of packing.
        rng: Shuffles the micro-batches.
        first_item: Micro-batches of all earlier passes.
    """
    if (size := settings.samples_per_item) is not None:
        if settings.drop_last:
            order = order[: len(order) // size * size]
        steps = np.arange(0, len(order), size, dtype=np.int64)
        return PassPlan(order, np.append(steps, len(order)))
    head, order = _pack_warm_up(lengths, order, settings, first_item)
    if not len(order):
        return head
    if settings.buffer_size is None:
        plan = best_fit(lengths, order, budget=settings.budget.full)
    else:
        plan = first_fit_buffered(
            lengths, order, budget=settings.budget.full, buffer_size=settings.buffer_size
        )
    return _join(head, _reorder(plan, rng.permutation(plan.size)))


class FirstFit(Generic[T]):
    """A buffer of samples in their order, from which micro-batches are packed by first fit."""

    def __init__(self) -> None:
        self.entries: list[tuple[T, int]] = []
        self.tokens = 0

    def add(self, sample: T, size: int) -> None:
        """Put a sample of `size` tokens behind the others."""
        self.entries.append((sample, size))
        self.tokens += size

    def is_ready(self, buffer_size: int, budget: int) -> bool:
        """Whether there is so much to choose from that a micro-batch may be packed."""
        return len(self.entries) >= buffer_size and self.tokens >= budget

    def take(self, budget: int) -> list[T]:
        """Take out, in order, every sample that still fits; the first always does."""
        picked: list[T] = []
        rest: list[tuple[T, int]] = []
        room = budget
        for place, (sample, size) in enumerate(self.entries):
            if room <= 0:
                rest.extend(self.entries[place:])
                break
            if size <= room or not picked:
                picked.append(sample)
                room -= size
            else:
                rest.append((sample, size))
        self.entries = rest
        self.tokens -= budget - room
        return picked

    def take_first(self, number: int) -> list[T]:
        """Take out the first `number` samples, or all where there are fewer."""
        picked, self.entries = self.entries[:number], self.entries[number:]
        self.tokens -= sum(size for _, size in picked)
        return [sample for sample, _ in picked]


def best_fit(lengths: npt.NDArray[np.int32], order: Ints, *, budget: int) -> PassPlan:
    """Best fit, longest samples first, ties in `order`: each goes where it leaves least room.

    Samples of one length are placed together, so that the work beside sorting grows with the
    number of different lengths. The number of micro-batches depends on the lengths alone.

    Args:
        lengths: Tokens of each sample, 1 to `budget`; [n].
        order: The samples of the pass; [m].
        budget: Tokens that a micro-batch may hold.
    """
    assert lengths[order].min() > 0
    assert lengths[order].max() <= budget
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
    buffer, bins = FirstFit[int](), _Bins()
    for sample, size in _entries(lengths, order):
        if buffer.is_ready(buffer_size, budget):
            bins.add(buffer.take(budget))
        buffer.add(sample, size)
    while buffer.entries:
        bins.add(buffer.take(budget))
    return bins.build()


def from_bins(found: list[list[int]]) -> PassPlan:
    """A plan of the given micro-batches."""
    bins = _Bins()
    for members in found:
        bins.add(members)
    return bins.build()


class _Bins:
    """Micro-batches as they are found, in numbers rather than objects."""

    def __init__(self) -> None:
        self._samples, self._ends = array("q"), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, samples: list[int]) -> None:
        self._samples.extend(samples)
        self._ends.append(len(self._samples))

    def build(self) -> PassPlan:
        return PassPlan(np.array(self._samples, np.int64), np.array(self._ends, np.int64))


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


def _entries(lengths: npt.NDArray[np.int32], order: Ints) -> Iterator[tuple[int, int]]:
    for start in range(0, len(order), CHUNK):
        part = order[start : start + CHUNK]
        yield from zip(part.tolist(), lengths[part].tolist(), strict=True)


def _pack_warm_up(
    lengths: npt.NDArray[np.int32], order: Ints, settings: PlanSettings, first_item: int
) -> tuple[PassPlan, Ints]:
    """The micro-batches of the warm-up in this pass, and the samples that are left."""
    schedule, bins, buffer = settings.budget, _Bins(), FirstFit[int]()
    num_warm = schedule.num_items - first_item
    if num_warm <= 0:
        return bins.build(), order
    buffer_size, taken = settings.buffer_size or 1, 0
    for sample, size in _entries(lengths, order):
        if len(bins) >= num_warm:
            break
        buffer.add(sample, size)
        taken += 1
        budget = schedule.budget(first_item + len(bins))
        if buffer.is_ready(buffer_size, budget):
            bins.add(buffer.take(budget))
    while buffer.entries and len(bins) < num_warm:
        bins.add(buffer.take(schedule.budget(first_item + len(bins))))
    waiting = np.array([sample for sample, _ in buffer.entries], np.int64)
    return bins.build(), np.concatenate([waiting, order[taken:]])


def _join(head: PassPlan, tail: PassPlan) -> PassPlan:
    samples = np.concatenate([head.samples, tail.samples])
    return PassPlan(samples, np.concatenate([head.bounds, tail.bounds[1:] + len(head.samples)]))


def _reorder(plan: PassPlan, order: Ints) -> PassPlan:
    sizes = np.diff(plan.bounds)[order]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    # Position p of the new plan belongs to new micro-batch b and reads from its old place.
    shift = np.repeat(plan.bounds[:-1][order] - bounds[:-1], sizes)
    return PassPlan(plan.samples[np.arange(len(plan.samples)) + shift], bounds)
