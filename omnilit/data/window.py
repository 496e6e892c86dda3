"""The training loader: packed micro-batches in windows, one window an optimizer step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from omnilit.data.batches import SampleSource, WorkerSettings, load_batches
from omnilit.data.packing import PlanSettings
from omnilit.data.passes import Passes, Position
from omnilit.errors import ConfigError
from omnilit.types import MicroBatch, StepStamp

NUM_TOKENS = "num_tokens"  # the name of real tokens among the sums of a window

Reduce = Callable[[Mapping[str, float]], Mapping[str, float]]


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

    Args:
        dataset: Samples by index, with their lengths.
        plan: Seed, budget and way of packing.
        layout: Which items are this rank's.
        steps_per_epoch: Windows of an epoch; None ends an epoch where its pass ends.
        workers: Processes that collate.
        max_steps: Most windows of an epoch, however it is measured; the next epoch goes on.
        reduce_counts: Sums a mapping over the data ranks.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        plan: PlanSettings,
        layout: WindowLayout,
        steps_per_epoch: int | None,
        workers: WorkerSettings,
        max_steps: int | None = None,
        reduce_counts: Reduce = dict,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.layout = layout
        self.steps_per_epoch = steps_per_epoch
        self.max_steps = max_steps
        self.workers = workers
        self.reduce_counts = reduce_counts
        self.position = Position()
        self._windows_done = 0  # of the epoch at hand; 0 between two epochs
        self._passes = Passes(dataset.lengths, plan)

    def __len__(self) -> int:
        """Micro-batches that this rank runs in the epoch at hand, those before a resume too."""
        return self.num_windows * self.layout.window_size

    @property
    def num_windows(self) -> int:
        """Optimizer steps of the epoch at hand, or of the next one between two."""
        if self.steps_per_epoch is not None:
            num_windows = self.steps_per_epoch
        else:
            is_open = self._windows_done > 0
            start = self.position if is_open else self._passes.open(self.position)
            left = self._passes.count_windows(start, self.layout.num_items)
            num_windows = self._windows_done + left
        return num_windows if self.max_steps is None else min(num_windows, self.max_steps)

    def count_windows(self, num_epochs: int) -> int:
        """Optimizer steps of a run of `num_epochs` epochs from its very beginning."""
        if self.steps_per_epoch is not None:
            return num_epochs * self.num_windows
        passes, num_items = self._passes, self.layout.num_items
        count = 0
        position = Position()
        for _ in range(num_epochs):
            position = passes.open(position)
            steps = passes.count_windows(position, num_items)
            steps = steps if self.max_steps is None else min(steps, self.max_steps)
            position = Position(position.pass_index, position.items + steps * num_items)
            count += steps
        return count

    @property
    def windows_per_pass(self) -> int:
        """Optimizer steps that the pass at hand has when it is read from its beginning."""
        beginning = Position(self.position.pass_index, 0)
        return self._passes.count_windows(beginning, self.layout.num_items)

    def __iter__(self) -> Iterator[MicroBatch]:
        """One epoch, or after `resume_epoch` what is left of it.

        Nothing happens before the first `next`: a trainer makes iterators that it never uses.
        """
        if not self._windows_done:
            self.position = self._passes.open(self.position)
        left = self.num_windows - self._windows_done
        if left <= 0:  # resumed at its end: nothing to run, and the next epoch is whole
            self._windows_done = 0
            return
        yield from self._run(left)

    def state_dict(self) -> dict[str, object]:
        """The position and what it is a position in; the same on every rank."""
        return {**self.position._asdict(), "plan": asdict(self.plan), "data": self._digest()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved position, at any number of ranks, window size and workers.

        Raises:
            ConfigError: The data or the packing is not what the position was saved for.
        """
        given, saved = asdict(self.plan), dict(_mapping(state["plan"]))
        keys = {
            "seed": "train.seed",
            "budget": "train.micro_batch_size",
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
        self.position = Position(int(str(state["pass_index"])), int(str(state["items"])))
        self._windows_done = 0

    def resume_epoch(self, windows_done: int) -> None:
        """Let the next `iter` be the rest of an epoch of which `windows_done` steps are run."""
        self._windows_done = windows_done

    def _run(self, num_windows: int) -> Iterator[MicroBatch]:
        num_items, size = self.layout.num_items, self.layout.window_size
        walk = (self.position, num_windows, num_items)
        bins = self._deal(self._passes.walk(*walk))
        batches = load_batches(self.dataset, bins, workers=self.workers)
        last = self._windows_done + num_windows
        for start in self._passes.walk(*walk):
            began = time.perf_counter()
            window = [next(batches) for _ in range(size)]
            waited = time.perf_counter() - began
            sums = dict(self.reduce_counts(_sum_counts(window)))
            num_tokens = int(sums.pop(NUM_TOKENS))
            for index, batch in enumerate(window):
                if index == size - 1:
                    self.position = self._passes.advance(start, num_items)
                    done = self._windows_done + 1
                    self._windows_done = done if done < last else 0
                stamp = StepStamp(sums, num_tokens, index, size, waited)
                yield replace(batch, stamp=stamp)

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
