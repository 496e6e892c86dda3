"""Items of streamed data: virtual shards, read by whichever rank and worker needs them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from omnilit.data.batches import WorkerSettings, loader_arguments, run_loader
from omnilit.data.collate import PLAIN, CollateSettings, collate, filler
from omnilit.data.files import DataFile, file_size
from omnilit.data.items import Fetched, Position, WindowLayout
from omnilit.data.multisource import Mixture
from omnilit.data.planned import changed_since
from omnilit.data.quarantine import BadRecord, check_bad_fraction
from omnilit.data.stream_shard import Shard, ShardState, StreamSettings
from omnilit.data.transforms import Transform
from omnilit.data.warmup import BudgetSchedule
from omnilit.errors import OmniError
from omnilit.logging import get_logger

log = get_logger(__name__)

SHARD_BYTES: Final = 16 * 2**20
MAX_SHARDS: Final = 1024
MAX_ROW_SHARDS: Final = 64  # of few files: each shard reads all of them
NUM_BAD, NUM_RECORDS = "num_bad", "num_records"
KEYS: Final = {
    "seed": "train.seed",
    "buffer_size": "data.dyn_bsz_buffer_size",
    "samples_per_item": "train.dyn_bsz or train.micro_batch_size",
    "is_silent": "data.silent_exception",
}


@dataclass(frozen=True, slots=True)
class StreamData:
    """What is streamed.

    Args:
        mixture: The sources, of which there may be one.
        files: Of each source.
        transform: Tokenises.
        tokens: Another text where samples would be others: tokenizer, template, settings.
    """

    mixture: Mixture
    files: tuple[tuple[DataFile, ...], ...]
    transform: Transform
    tokens: str

    def fingerprint(self) -> str:
        """Equal only for equal files, by name and size, and an equal transform."""
        files = [[(f.path, f.format, file_size(f)) for f in found] for found in self.files]
        text = repr((self.mixture, files, self.tokens))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def count_shards(files: Sequence[Sequence[DataFile]]) -> int:
    """Virtual shards of some sources: a power of two that depends on the data alone.

    A shard is about 16 MiB. Of few files there are at most `MAX_ROW_SHARDS`, as each shard
    reads all of them, and likewise where sizes are not known.
    """
    sizes = [file_size(file) for found in files for file in found]
    if any(size is None for size in sizes):
        return MAX_ROW_SHARDS
    by_size = sum(size or 0 for size in sizes) / SHARD_BYTES
    most = min(max(MAX_ROW_SHARDS, min(map(len, files))), MAX_SHARDS)
    return 2 ** max(0, math.floor(math.log2(min(max(by_size, 1), most))))


class StreamedItems:
    """Micro-batches of data that is tokenised while it is trained on; an `ItemStream`.

    Item k comes from shard k mod V. So where V is a multiple of ranks times workers, each of
    them reads shards of its own; elsewhere it follows more shards than it takes items of. The
    order depends on the data and the settings alone. A stream has no passes for a trainer: each
    shard begins its rows again, reshuffled, when they are used up.

    Args:
        data: Sources and transform.
        settings: Packing, seed and shards.
        workers: Processes that read, tokenise and pack.
        collate: What micro-batches hold.
        max_bad_fraction: Share of skipped records that stops the run.
        on_bad: Is given the records that this rank skipped.
    """

    def __init__(
        self,
        data: StreamData,
        settings: StreamSettings,
        *,
        workers: WorkerSettings,
        collate: CollateSettings = PLAIN,
        max_bad_fraction: float = 0.01,
        on_bad: Callable[[Sequence[BadRecord]], None] | None = None,
    ) -> None:
        self.data = data
        self.settings = settings
        self._workers = workers
        self._collate = collate
        self._limit = max_bad_fraction
        self._on_bad = on_bad
        self._states: dict[int, list[object]] = {}
        self._num_bad = self._num_records = 0.0
        self._fingerprint = data.fingerprint()

    @property
    def budget(self) -> int:
        """Tokens of a full item, or its samples."""
        return self.settings.samples_per_item or self.settings.budget.full

    @property
    def is_per_rank(self) -> bool:
        """Yes: a rank knows the shards that it took items of."""
        return True

    def fetch(
        self, start: Position, *, num_windows: int, layout: WindowLayout
    ) -> Iterator[Fetched]:
        """See `ItemStream`."""
        if (layout.data_size * max(self._workers.num_workers, 1)) > self.settings.num_shards:
            log.info(
                "datasets_type iterable: %d readers share %d virtual shards, so records are read "
                "more than once; more files would make more shards",
                layout.data_size * max(self._workers.num_workers, 1),
                self.settings.num_shards,
            )
        source = _Items(
            self.data,
            self.settings,
            self._collate,
            dict(self._states),
            _item_numbers(start, num_windows, layout),
        )
        loader = DataLoader(source, **loader_arguments(self._workers))
        return map(_raise_failed, run_loader(loader))

    def empty(self) -> Fetched:
        """See `ItemStream`."""
        return Fetched(filler(self._collate), None, {NUM_BAD: 0.0, NUM_RECORDS: 0.0})

    def open(self, position: Position) -> Position:
        """A stream has no end."""
        return position

    def advance(self, start: Position, num_items: int) -> Position:
        """See `ItemStream`."""
        return Position(start.pass_index, start.items + num_items)

    def count_windows(self, start: Position, num_items: int) -> None:
        """Not known."""

    def commit(self, window: Sequence[Fetched], sums: Mapping[str, float]) -> None:
        """Remember where shards are, hand on skipped records, and stop at too many."""
        for one in window:
            shard, state, bad = one.state
            self._states[shard] = state
            if bad and self._on_bad is not None:
                self._on_bad(bad)
        self._num_bad += sums[NUM_BAD]
        self._num_records += sums[NUM_RECORDS]
        check_bad_fraction(self._num_bad, self._num_records, limit=self._limit, is_final=False)

    def state_dict(self) -> dict[str, object]:
        """See `ItemStream`."""
        return {
            "stream": asdict(self.settings),
            "data": self._fingerprint,
            "shards": dict(self._states),
            "bad": [self._num_bad, self._num_records],
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See `ItemStream`; the number of shards and a warm-up stay as they were."""
        saved, given = dict(states[0]["stream"]), asdict(self.settings)
        changed = [
            f"{key} ({name} {saved[name]}, now {given[name]})"
            for name, key in KEYS.items()
            if saved[name] != given[name]
        ]
        budget = BudgetSchedule(**saved["budget"])
        if budget.full != self.settings.budget.full:
            key = "train.micro_batch_size * data.max_seq_len"
            changed.append(f"{key} (budget {budget.full}, now {self.settings.budget.full})")
        if states[0]["data"] != self._fingerprint:
            changed.append("data.train_path or how it is tokenised")
        if changed:
            raise changed_since(changed)
        self.settings = replace(self.settings, budget=budget, num_shards=saved["num_shards"])
        self._num_bad, self._num_records = states[0]["bad"]
        self._states = {}
        for state in states:
            for shard, plain in state["shards"].items():
                known = self._states.get(shard)
                if known is None or ShardState.of(known).items < ShardState.of(plain).items:
                    self._states[shard] = plain


class _Items(IterableDataset[Fetched | OmniError]):
    """The items that a rank needs; in a worker, those that it makes."""

    def __init__(
        self,
        data: StreamData,
        settings: StreamSettings,
        collate: CollateSettings,
        states: dict[int, list[object]],
        numbers: Sequence[int],
    ) -> None:
        self._data, self._settings, self._collate = data, settings, collate
        self._states, self._numbers = states, numbers
        self._shards: dict[int, Shard] = {}

    def __iter__(self) -> Iterator[Fetched | OmniError]:
        info = get_worker_info()
        worker, step = (0, 1) if info is None else (info.id, info.num_workers)
        for number in self._numbers[worker::step]:
            try:
                yield self._make(number)
            except OmniError as error:  # torch would lose its kind on the way
                yield error
                return

    def _make(self, number: int) -> Fetched:
        index, num_shards = number % self._settings.num_shards, self._settings.num_shards
        shard = self._open(index)
        while shard.state.items < number // num_shards:
            shard.next_item()  # somebody else's
        item = shard.next_item()
        counts = {NUM_BAD: float(len(item.bad)), NUM_RECORDS: float(item.num_records)}
        return Fetched(collate(item.samples, self._collate), (index, item.state, item.bad), counts)

    def _open(self, index: int) -> Shard:
        if index not in self._shards:
            shard = Shard(
                index,
                mixture=self._data.mixture,
                files=self._data.files,
                transform=self._data.transform,
                settings=self._settings,
            )
            if (state := self._states.get(index)) is not None:
                shard.restore(ShardState.of(state))
            self._shards[index] = shard
        return self._shards[index]


def _item_numbers(start: Position, num_windows: int, layout: WindowLayout) -> range:
    """The items of a rank: every `data_size`-th of all windows."""
    first = start.items + layout.data_rank
    return range(first, start.items + num_windows * layout.num_items, layout.data_size)


def _raise_failed(found: Fetched | OmniError) -> Fetched:
    if isinstance(found, OmniError):
        raise found
    return found
