"""Items of data with a length: every pass is planned before it begins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from omnilit.data.balance import balance
from omnilit.data.batches import Made, SampleSource, WorkerSettings, load_batches
from omnilit.data.collate import PLAIN, CollateSettings, make_batch
from omnilit.data.items import Fetched, Position, WindowLayout
from omnilit.data.packing import Ints, PassPlan, PlanSettings, make_generator, plan_pass
from omnilit.data.quarantine import Skipping, check_bad_fraction
from omnilit.data.warmup import BudgetSchedule
from omnilit.errors import ConfigError

BAD, RECORDS = "bad", "records"
KEYS = {
    "seed": "train.seed",
    "buffer_size": "data.dyn_bsz_buffer_size",
    "samples_per_item": "train.dyn_bsz or train.micro_batch_size",
}


class PlannedItems:
    """Micro-batches of prepared samples, pass after pass; an `ItemStream`.

    A pass is a pure function of the settings, the lengths and its number, so that its state is
    one integer. The last window of a pass is filled with label-free micro-batches, or left out
    where the settings say so.

    Args:
        dataset: Samples by index, with their lengths.
        settings: What the plans depend on.
        collate: What micro-batches hold.
        workers: Processes that collate.
        fingerprint: Equal only for equal data.
        num_items: Micro-batches of a window on all ranks.
        order: The samples of a pass by its number; by default all of them, shuffled.
        skipping: What becomes of samples whose media turn out to be bad.
    """

    def __init__(
        self,
        dataset: SampleSource,
        settings: PlanSettings,
        *,
        workers: WorkerSettings,
        fingerprint: str,
        num_items: int = 1,
        collate: CollateSettings = PLAIN,
        order: Callable[[int], Ints] | None = None,
        skipping: Skipping | None = None,
    ) -> None:
        if settings.samples_per_item is None:
            check_budget(dataset, settings.budget.full)
        self.dataset = dataset
        self.settings = settings
        self._workers = workers
        self._fingerprint = fingerprint
        self._num_items = num_items
        self._collate = collate
        self._order = order
        self._skipping = skipping or Skipping()
        self._plans: dict[int, PassPlan] = {}
        self._sizes: dict[int, int] = {}
        self._totals: Counter[str] = Counter()
        if settings.drop_last:
            self._check_steps()

    @property
    def budget(self) -> int:
        """Tokens of a full item, or its samples."""
        return self.settings.samples_per_item or self.settings.budget.full

    @property
    def is_per_rank(self) -> bool:
        """No: plans are the same on all ranks."""
        return False

    def plan(self, pass_index: int) -> PassPlan:
        """The plan of a pass; those of the last two passes asked for are kept."""
        if pass_index not in self._plans:
            # workers fetch ahead into the next pass while this one is still consumed
            self._plans = {k: v for k, v in self._plans.items() if k == pass_index - 1}
            rng = make_generator(self.settings.seed, pass_index)
            if self._order is None:
                order = rng.permutation(len(self.dataset.lengths))
            else:
                order = self._order(pass_index)
            first = self._first_item(pass_index)
            plan = plan_pass(self.dataset.lengths, order, self.settings, rng, first_item=first)
            self._plans[pass_index], self._sizes[pass_index] = plan, plan.size
        return self._plans[pass_index]

    def fetch(
        self, start: Position, *, num_windows: int, layout: WindowLayout
    ) -> Iterator[Fetched]:
        """See `ItemStream`."""
        bins = self._deal(start, num_windows, layout)
        batches = load_batches(self.dataset, bins, workers=self._workers, settings=self._collate)
        return (self._count(made) for made in batches)

    def empty(self) -> Fetched:
        """See `ItemStream`."""
        return self._count(Made(make_batch((), self._collate)))

    def _count(self, made: Made) -> Fetched:
        if self._collate.media is None:
            return Fetched(made.batch)
        read = len(made.batch.origins) + len(made.bad)
        return Fetched(made.batch, made.bad, {BAD: len(made.bad), RECORDS: read})

    def open(self, position: Position) -> Position:
        """See `ItemStream`."""
        if self._left(position):
            return position
        return Position(position.pass_index + 1, 0)

    def advance(self, start: Position, num_items: int) -> Position:
        """See `ItemStream`; never beyond the end of the pass."""
        end = min(start.items + num_items, self.plan(start.pass_index).size)
        return Position(start.pass_index, end)

    def count_windows(self, start: Position, num_items: int) -> int:
        """See `ItemStream`."""
        left = self.plan(start.pass_index).size - start.items
        return left // num_items if self.settings.drop_last else math.ceil(left / num_items)

    def commit(
        self,
        window: Sequence[Fetched],
        sums: Mapping[str, float],
        *,
        start: Position,  # noqa: ARG002 - plans know it
        is_last: bool,
    ) -> None:
        """Hand on skipped records and stop at too many; plans are made again."""
        for one in window:
            if one.state:
                self._skipping.on_bad(one.state)
        if sums:
            self._totals.update(sums)
            num_bad, num_read = self._totals[BAD], self._totals[RECORDS]
            limit = self._skipping.max_bad_fraction
            check_bad_fraction(num_bad, num_read, limit=limit, is_final=is_last)

    def state_dict(self) -> dict[str, object]:
        """See `ItemStream`."""
        return {"plan": asdict(self.settings), "data": self._fingerprint}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See `ItemStream`; a warm-up goes on as it was begun."""
        plan = dict(states[0]["plan"])
        same_data = states[0]["data"] == self._fingerprint
        saved = resumed_budget(plan, asdict(self.settings), KEYS, has_same_data=same_data)
        self.settings = replace(self.settings, budget=saved)
        self._plans, self._sizes = {}, {}

    def _check_steps(self) -> None:
        """See that the first pass has a full step."""
        assert self.settings.samples_per_item is not None, "drop_last is for samples, not tokens"
        if self.count_windows(Position(), self._num_items):
            return
        raise ConfigError(
            key="train.global_batch_size",
            problem=f"a step takes {self._num_items * self.settings.samples_per_item} samples, but "
            f"a pass has {len(self.plan(0).samples)}, and data.dataloader.drop_last leaves out a "
            "step that is not full: nothing would be trained",
            fix="lower it, or set data.dataloader.drop_last: false",
        )

    def _left(self, position: Position) -> int:
        return self.count_windows(position, self._num_items)

    def _first_item(self, pass_index: int) -> int:
        """Items of all earlier passes, or enough of them to be past the warm-up."""
        total, warm = 0, self.settings.budget.num_items
        for earlier in range(pass_index):
            if total >= warm:
                break
            if earlier not in self._sizes:
                self.plan(earlier)
            total += self._sizes[earlier]
        return total

    def _deal(self, start: Position, num_windows: int, layout: WindowLayout) -> Iterator[list[int]]:
        """The samples of each micro-batch of this rank."""
        position = start
        for _ in range(num_windows):
            position = self.open(position)
            plan = self.plan(position.pass_index)
            items = [plan.get(position.items + i) for i in range(layout.num_items)]
            if layout.data_size == 1:
                yield from items
            else:
                costs = [self._cost(item) for item in items]
                mine = balance(costs, layout.data_size)[layout.data_rank]
                yield from (items[i] for i in mine)
            position = self.advance(position, layout.num_items)

    def _cost(self, samples: list[int]) -> float:
        """Attention's work: the squares of the segments' lengths; then their tokens."""
        lengths = self.dataset.lengths[samples].astype(np.float64)
        return float((lengths * lengths).sum() + lengths.sum() * 1e-3)


def check_budget(dataset: SampleSource, budget: int) -> None:
    """See that every sample fits in a micro-batch of `budget` tokens.

    Raises:
        ConfigError: One does not, such as a preference pair.
    """
    longest = int(dataset.lengths.max(initial=0))
    if longest > budget:
        raise ConfigError(
            key="train.micro_batch_size",
            problem=f"a micro-batch of {budget} tokens cannot hold the longest sample, which has "
            f"{longest}",
            fix="raise it, or lower data.max_seq_len",
        )


def resumed_budget(
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    keys: Mapping[str, str],
    *,
    has_same_data: bool,
) -> BudgetSchedule:
    """The budget that a run was saved with, where its position means the same today.

    Args:
        saved: The settings of the checkpoint, as plain values.
        given: Today's.
        keys: The settings that must not change, with the YAML path of each.
        has_same_data: Whether the data is what it was.

    Raises:
        ConfigError: Names all that changed.
    """
    changed = [
        f"{key} ({name} {saved[name]}, now {given[name]})"
        for name, key in keys.items()
        if saved[name] != given[name]
    ]
    budget, full = BudgetSchedule(**saved["budget"]), given["budget"]["full"]
    if budget.full != full:
        key = "train.micro_batch_size * data.max_seq_len"
        changed.append(f"{key} (budget {budget.full}, now {full})")
    if not has_same_data:
        changed.append("data.train_path or how it is tokenised")
    if not changed:
        return budget
    raise ConfigError(
        key="train.checkpoint.load_path",
        problem=f"since the checkpoint was saved, this changed: {', '.join(changed)}",
        fix="set it back, or begin a new run with model.model_path",
    )
