"""The training loader: packed micro-batches in windows, one window an optimizer step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from omnilit.data.batches import SampleSource, WorkerSettings, load_batches
from omnilit.data.collate import filler
from omnilit.data.packing import PlanSettings
from omnilit.data.passes import EpochProgress, EpochSteps, Passes, Position
from omnilit.errors import ConfigError, DataError, OmniError
from omnilit.logging import get_logger
from omnilit.parallel.collectives import sum_or_raise
from omnilit.types import MicroBatch, StepStamp

log = get_logger(__name__)
NUM_TOKENS = "num_tokens"  # the name of real tokens among the sums of a window

Reduce = Callable[[Mapping[str, float], BaseException | None], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class WindowLayout:
    """How a window is dealt: micro-batch i of rank r is item i * data_size + r.

    So 1 rank with 4 micro-batches, 2 with 2 and 4 with 1 train the same steps.

    Args:
        data_rank: This rank among those that read different data.
        data_size: Number of such ranks.
        window_size: Micro-batches that each of them runs in a step.
    """

    data_rank: int = 0
    data_size: int = 1
    window_size: int = 1

    @property
    def num_items(self) -> int:
        """Micro-batches of a window on all ranks."""
        return self.data_size * self.window_size


def steps_per_epoch(train_size: int, *, tokens_per_step: int) -> int:
    """Optimizer steps that an epoch of `train_size` tokens has.

    Args:
        train_size: Tokens of an epoch.
        tokens_per_step: micro_batch_size * max_seq_len * ranks * window size.
    """
    return math.ceil(train_size / tokens_per_step)


class TrainLoader:
    """Micro-batches for training, epoch after epoch, each stamped with its step's counts.

    Every `iter` yields one epoch and goes on where the last one stopped: an epoch may be part
    of a pass or hold several. The last window of a pass is filled with label-free
    micro-batches. The order depends on the plan alone, never on ranks or workers.

    The position counts a window once its last micro-batch is handed out, so what workers have
    fetched ahead does not count. Every rank must iterate alike: each window is one `reduce`.

    A resume goes on inside the epoch that was saved. What is left of it is what remains of its
    tokens, or of its pass, in steps of today's size; `max_steps` is compared with the steps that
    were run of it, whatever each held. An epoch that has nothing left is over, and the next
    `iter` begins the next one.

    Args:
        dataset: Samples by index, with their lengths.
        plan: Seed, budget and way of packing.
        layout: Which items are this rank's.
        train_size: Tokens of an epoch, each micro-batch taken as full; None ends an epoch where
            its pass ends.
        workers: Processes that collate.
        max_steps: Most windows of an epoch, however it is measured; the next epoch goes on.
        reduce_counts: Sums a mapping over the data ranks, or raises on all of them where one
            gives an error; see `sum_or_raise`.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        plan: PlanSettings,
        layout: WindowLayout,
        train_size: int | None,
        workers: WorkerSettings,
        max_steps: int | None = None,
        reduce_counts: Reduce = sum_or_raise,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.layout = layout
        self.train_size = train_size
        self.max_steps = max_steps
        self.workers = workers
        self.reduce_counts = reduce_counts
        self.position = Position()
        self._epoch = EpochProgress()
        self._passes = Passes(dataset.lengths, plan)

    def __len__(self) -> int:
        """Micro-batches that this rank runs in the epoch at hand, those before a resume too."""
        return self.num_windows * self.layout.window_size

    @property
    def num_windows(self) -> int:
        """Optimizer steps of the epoch at hand, or of the next one where it is over."""
        done, left = self.epoch_steps
        if done and not left:
            return self._count_left(EpochProgress(), self.position)
        return done + left

    @property
    def epoch_steps(self) -> EpochSteps:
        """How much of the epoch at hand is run; one that has just ended is still at hand."""
        return EpochSteps(self._epoch.steps, self._count_left(self._epoch, self.position))

    def count_windows(self, num_epochs: int) -> int:
        """Optimizer steps of a run of `num_epochs` epochs from its very beginning."""
        if self.train_size is not None:
            return num_epochs * self._count_left(EpochProgress(), Position())
        num_items, count = self.layout.num_items, 0
        position = Position()
        for _ in range(num_epochs):
            steps = self._count_left(EpochProgress(), position)
            position = self._passes.open(position)
            position = Position(position.pass_index, position.items + steps * num_items)
            count += steps
        return count

    @property
    def passes_per_epoch(self) -> float:
        """Trips through the data in a whole epoch, by the length of the pass at hand."""
        beginning = Position(self.position.pass_index, 0)
        per_pass = self._passes.count_windows(beginning, self.layout.num_items)
        return self._count_left(EpochProgress(), beginning) / max(per_pass, 1)

    def __iter__(self) -> Iterator[MicroBatch]:
        """What is left of the epoch at hand, or the next epoch where it is over.

        Nothing happens before the first `next`: a trainer makes iterators that it never uses.
        """
        if not self.epoch_steps.left:
            self._epoch = EpochProgress()
        if not self._epoch.steps:
            self.position = self._passes.open(self.position)
        yield from self._run(self.epoch_steps.left)

    def state_dict(self) -> dict[str, object]:
        """The position and what it is a position in; the same on every rank."""
        return {
            **self.position._asdict(),
            "epoch_steps": self._epoch.steps,
            "epoch_items": self._epoch.items,
            "items_per_step": self.layout.num_items,
            "plan": asdict(self.plan),
            "data": self._digest(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved position, at any number of ranks, window size and workers.

        Raises:
            ConfigError: The data or the packing is not what the position was saved for.
        """
        given, saved = asdict(self.plan), dict(_mapping(state["plan"]))
        keys = {
            "seed": "train.seed",
            "budget": "train.micro_batch_size * data.max_seq_len",
            "buffer_size": "data.dyn_bsz_buffer_size",
        }
        problems = [
            f"{keys[name]} ({name} {saved[name]}, now {value})"
            for name, value in given.items()
            if saved[name] != value
        ]
        if state["data"] != self._digest():
            problems.append("data.train_path or how it is tokenised")
        if problems:
            raise ConfigError(
                key="train.checkpoint.load_path",
                problem=f"since the checkpoint was saved, this changed: {', '.join(problems)}",
                fix="set it back, or begin a new run with model.model_path",
            )
        pass_index, items, steps, epoch_items, items_per_step = (
            int(str(state[name]))
            for name in ("pass_index", "items", "epoch_steps", "epoch_items", "items_per_step")
        )
        self.position = Position(pass_index, items)
        self._epoch = EpochProgress(steps, epoch_items)
        if items_per_step != self.layout.num_items:
            log.info(
                "resume: a step held %d micro-batches when it was saved and holds %d now; the "
                "epoch has %d steps behind it and %d of today's size to go, and the learning rate "
                "follows a run that is in steps of today's size from its beginning",
                items_per_step,
                self.layout.num_items,
                *self.epoch_steps,
            )

    def _count_left(self, epoch: EpochProgress, position: Position) -> int:
        """Windows of an epoch of which `epoch` is run, up to `position`."""
        num_items = self.layout.num_items
        if self.train_size is not None:
            tokens = max(self.train_size - epoch.items * self.plan.budget, 0)
            left = steps_per_epoch(tokens, tokens_per_step=self.plan.budget * num_items)
        else:
            start = position if epoch.steps else self._passes.open(position)
            left = self._passes.count_windows(start, num_items)
        if self.max_steps is not None:
            left = min(left, self.max_steps - epoch.steps)
        return max(left, 0)

    def _run(self, num_windows: int) -> Iterator[MicroBatch]:
        num_items, size = self.layout.num_items, self.layout.window_size
        walk = (self.position, num_windows, num_items)
        bins = self._deal(self._passes.walk(*walk))
        batches = load_batches(self.dataset, bins, workers=self.workers)
        for start in self._passes.walk(*walk):
            began = time.perf_counter()
            window = self._fetch(batches)
            waited = time.perf_counter() - began
            sums = dict(self._reduce(_sum_counts(window), None))
            num_tokens = int(sums.pop(NUM_TOKENS))
            for index, batch in enumerate(window):
                if index == size - 1:
                    steps, items = self._epoch
                    self.position = self._passes.advance(start, num_items)
                    self._epoch = EpochProgress(steps + 1, items + num_items)
                stamp = StepStamp(sums, num_tokens, index, size, waited)
                yield replace(batch, stamp=stamp)

    def _fetch(self, batches: Iterator[MicroBatch]) -> list[MicroBatch]:
        """The next window; an error reaches the other ranks before it is raised."""
        try:
            return [next(batches) for _ in range(self.layout.window_size)]
        except BaseException as error:
            if isinstance(error, Exception):  # what stops the process does not wait for others
                self._reduce(_sum_counts([filler()]), error)
            raise

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

    def _deal(self, starts: Iterator[Position]) -> Iterator[list[int]]:
        """The samples of each micro-batch of this rank."""
        layout = self.layout
        for pass_index, items in starts:
            for i in range(layout.window_size):
                plan = self._passes.plan(pass_index)
                yield plan.get(items + i * layout.data_size + layout.data_rank)

    def _digest(self) -> str:
        return hashlib.blake2b(self.dataset.lengths.tobytes(), digest_size=16).hexdigest()


def _sum_counts(window: list[MicroBatch]) -> dict[str, float]:
    names = window[0].counts
    sums = {name: float(sum(batch.counts[name] for batch in window)) for name in names}
    return {**sums, NUM_TOKENS: float(sum(batch.num_tokens for batch in window))}


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value
