"""The training loader: packed micro-batches in windows, one window an optimizer step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from omnilit.data.epochs import EpochLength, EpochProgress, EpochSteps
from omnilit.data.items import Fetched, ItemStream, Position, WindowLayout
from omnilit.errors import ConfigError, DataError, OmniError
from omnilit.logging import get_logger
from omnilit.parallel.collectives import sum_or_raise
from omnilit.types import MODALITIES, Grid, MicroBatch, StepStamp, StepWindow

log = get_logger(__name__)
NUM_TOKENS = "num_tokens"  # the name of real tokens among the sums of a window
EXTRA = "extra/"  # in front of the names of `Fetched.counts`
MEDIA = "media/"  # in front of a micro-batch's place in the window, and of a kind of media

Reduce = Callable[[Mapping[str, float], BaseException | None], Mapping[str, float]]
WindowGrids = Sequence[Mapping[str, Sequence[Grid]]]  # by micro-batch and kind of media
GatherGrids = Callable[[WindowGrids], Sequence[WindowGrids]]


class TrainLoader:
    """Micro-batches for training, epoch after epoch, each stamped with its step's counts.

    Every `iter` yields one epoch and goes on where the last one stopped: an epoch may be part
    of a pass or hold several. The order depends on the items alone, never on ranks or workers.

    The position counts a window once its last micro-batch is handed out, so what workers have
    fetched ahead does not count. Every rank must iterate alike: each window is one `reduce`.

    A resume goes on inside the epoch that was saved. What is left of it is what remains of its
    size, or of its pass, in steps of today's size; `max_steps` is compared with the steps that
    were run of it, whatever each held. An epoch that has nothing left is over, and the next
    `iter` begins the next one.

    Args:
        items: Provides the micro-batches.
        layout: Which items are this rank's.
        epochs: How long an epoch is.
        reduce_counts: Sums a mapping over the data ranks, or raises on all of them where one
            gives an error; see `sum_or_raise`.
        gather_grids: Gives what each data rank has, by rank; None where stamps need not say it.
    """

    def __init__(
        self,
        items: ItemStream,
        *,
        layout: WindowLayout,
        epochs: EpochLength,
        reduce_counts: Reduce = sum_or_raise,
        gather_grids: GatherGrids | None = None,
    ) -> None:
        self.items = items
        self.layout = layout
        self.epochs = epochs
        self.reduce_counts = reduce_counts
        self.gather_grids = gather_grids
        self.position = Position()
        self._epoch = EpochProgress()

    def __len__(self) -> int:
        """Micro-batches that this rank runs in the epoch at hand, those before a resume too."""
        return self.num_windows * self.layout.window_size

    @property
    def num_windows(self) -> int:
        """Optimizer steps of the epoch at hand, or of the next one where it is over."""
        done, left = self.epoch_steps
        if done and not left:
            return self._count_left(self._next_epoch(), self.position)
        return done + left

    @property
    def epoch_steps(self) -> EpochSteps:
        """How much of the epoch at hand is run; one that has just ended is still at hand."""
        return EpochSteps(self._epoch.steps, self._count_left(self._epoch, self.position))

    def count_windows(self, num_epochs: int) -> int:
        """Optimizer steps of a run of `num_epochs` epochs from its very beginning."""
        count, position = 0, Position()
        for index in range(num_epochs):
            steps = self._count_left(EpochProgress(number=index), position)
            if self.epochs.size is None:
                position = self.items.open(position)
                end = position.items + steps * self.layout.num_items
                position = position._replace(items=end)
            count += steps
        return count

    @property
    def passes_per_epoch(self) -> float | None:
        """Trips through the data in a whole epoch, by the pass at hand; None if not known."""
        beginning = Position(self.position.pass_index, 0)
        per_pass = self.items.count_windows(beginning, self.layout.num_items)
        if per_pass is None:
            return None
        return self._count_left(EpochProgress(number=self._epoch.number), beginning) / max(
            per_pass, 1
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        """What is left of the epoch at hand, or the next epoch where it is over.

        Nothing happens before the first `next`: a trainer makes iterators that it never uses.
        """
        if not self.epoch_steps.left:
            self._epoch = self._next_epoch()
        if not self._epoch.steps:
            self.position = self.items.open(self.position)
        yield from self._run(self.epoch_steps.left)

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in."""
        return {
            **self.position._asdict(),
            "epoch": self._epoch._asdict(),
            "items_per_step": self.layout.num_items,
            "item_state": self.items.state_dict(),
            "per_rank": self.items.is_per_rank,
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a saved position, at any number of ranks, window size and workers.

        Args:
            states: What `state_dict` gave: on one rank, where all are the same, or on each.

        Raises:
            ConfigError: The data or the packing is not what the position was saved for.
        """
        self._check_kind(states[0]["item_state"])
        self.items.load_state_dicts([state["item_state"] for state in states])
        state = states[0]
        self.position = Position(int(state["pass_index"]), int(state["items"]))
        self._epoch = EpochProgress(**state["epoch"])
        if state["items_per_step"] != self.layout.num_items:
            log.info(
                "resume: a step held %d micro-batches when it was saved and holds %d now; the "
                "epoch has %d steps behind it and %d of today's size to go, and the learning rate "
                "follows a run that is in steps of today's size from its beginning",
                state["items_per_step"],
                self.layout.num_items,
                *self.epoch_steps,
            )

    def _check_kind(self, saved: Mapping[str, Any]) -> None:
        if saved.keys() != self.items.state_dict().keys():
            raise ConfigError(
                key="data.datasets_type",
                problem="the checkpoint was saved with data that was read in another way",
                fix="set data.datasets_type back, or begin a new run with model.model_path",
            )

    def _next_epoch(self) -> EpochProgress:
        return EpochProgress(number=self._epoch.number + 1)

    def _count_left(self, epoch: EpochProgress, position: Position) -> int:
        """Windows of an epoch of which `epoch` is run, up to `position`."""
        num_items = self.layout.num_items
        left = None
        if self.epochs.size is None:
            start = position if epoch.steps else self.items.open(position)
            left = self.items.count_windows(start, num_items)
        return self.epochs.count_left(
            epoch, num_items=num_items, item_size=self.items.budget, left_of_pass=left
        )

    def _run(self, num_windows: int) -> Iterator[MicroBatch]:
        num_items, size = self.layout.num_items, self.layout.window_size
        fetched = self.items.fetch(self.position, num_windows=num_windows, layout=self.layout)
        for number in range(num_windows):
            start = self.items.open(self.position)
            began = time.perf_counter()
            window = self._fetch(fetched)
            waited = time.perf_counter() - began
            sums = dict(self._reduce(_sum_counts(window, size), None))
            extra = {n.removeprefix(EXTRA): sums.pop(n) for n in list(sums) if n.startswith(EXTRA)}
            is_last = number == num_windows - 1
            self.items.commit(window, extra, start=start, is_last=is_last)
            num_tokens = int(sums.pop(NUM_TOKENS))
            media, grids = _take_media(sums), self._gather(window)
            for index, one in enumerate(window):
                if index == size - 1:
                    self.position = self.items.advance(start, num_items)
                    steps, items, epoch = self._epoch
                    self._epoch = EpochProgress(steps + 1, items + num_items, epoch)
                kinds = media.get(index, frozenset())
                stamp = StepStamp(sums, num_tokens, index, size, waited, kinds, grids[index])
                yield replace(one.batch, stamp=stamp)

    def _fetch(self, fetched: Iterator[Fetched]) -> list[Fetched]:
        """The next window; an error reaches the other ranks before it is raised."""
        try:
            return [next(fetched) for _ in range(self.layout.window_size)]
        except BaseException as error:
            if isinstance(error, Exception):  # what stops the process does not wait for others
                self._reduce(_sum_counts([self.items.empty()], self.layout.window_size), error)
            raise

    def _gather(
        self, window: Sequence[Fetched]
    ) -> Sequence[Mapping[str, Sequence[Sequence[Grid]]] | None]:
        """What each data rank has to look at in each micro-batch; see `StepStamp.grids`."""
        if self.gather_grids is None:
            return [None] * len(window)
        by_rank = self.gather_grids([one.batch.grids for one in window])
        return [
            {
                kind: [own.get(kind, ()) for own in at]
                for kind in MODALITIES
                if any(kind in own for own in at)
            }
            for at in zip(*by_rank, strict=True)
        ]

    def _reduce(
        self, counts: Mapping[str, float], error: BaseException | None
    ) -> Mapping[str, float]:
        try:
            return self.reduce_counts(counts, error)
        except OmniError as caught:
            if caught is error or isinstance(caught, DataError):
                raise
            raise DataError(
                problem=f"another rank could not read its data ({caught})",
                fix="look at that rank's own error in its log",
            ) from caught


class WholeWindows:
    """A loader's windows, each as one: what a pipeline trains on at a time.

    Args:
        loader: Deals micro-batches.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Windows of the epoch at hand, those before a resume too."""
        return self.loader.num_windows

    def __iter__(self) -> Iterator[StepWindow]:
        """What is left of the epoch at hand; see `TrainLoader`."""
        batches, size = iter(self.loader), self.loader.layout.window_size
        while window := tuple(islice(batches, size)):
            yield StepWindow(window)


def _sum_counts(window: Sequence[Fetched], size: int) -> dict[str, float]:
    """What the ranks add up, under the same names on each, also where a window is not whole."""
    sums: Counter[str] = Counter()
    for one in window:
        sums.update(one.batch.counts)
        sums.update({f"{EXTRA}{name}": value for name, value in one.counts.items()})
        sums[NUM_TOKENS] += one.batch.num_tokens
    sums.update({f"{MEDIA}{index}/{kind}": 0 for index in range(size) for kind in MODALITIES})
    for index, one in enumerate(window):
        sums.update(f"{MEDIA}{index}/{kind}" for kind in one.batch.modalities)
    return {name: float(value) for name, value in sums.items()}


def _take_media(sums: dict[str, float]) -> dict[int, frozenset[str]]:
    """The kinds of media at each place of the window on any rank, taken out of the sums."""
    found: dict[int, set[str]] = {}
    for name in [name for name in sums if name.startswith(MEDIA)]:
        index, kind = name.removeprefix(MEDIA).split("/")
        if sums.pop(name):
            found.setdefault(int(index), set()).add(kind)
    return {index: frozenset(kinds) for index, kinds in found.items()}
