"""Items of streamed data: virtual shards, read by whichever rank and worker needs them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any, Final

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from omnilit.data.batches import (
    WorkerSettings,
    loader_arguments,
    make_or_skip,
    raise_failed,
    run_loader,
)
from omnilit.data.collate import PLAIN, CollateSettings, make_batch
from omnilit.data.files import DataFile, file_size, sampled_fingerprint
from omnilit.data.items import Fetched, Position, WindowLayout
from omnilit.data.multisource import Mixture
from omnilit.data.planned import resumed_budget
from omnilit.data.quarantine import BadRecord, check_bad_fraction
from omnilit.data.readers import read_rows
from omnilit.data.streams.rows import BLOCK_ROWS, SourceRows, deal_files
from omnilit.data.streams.shard import BAD, COUNTS, ENDED, RECORDS, SAMPLES, Shard
from omnilit.data.streams.state import ShardState, StreamSettings
from omnilit.data.transforms import Transform
from omnilit.errors import DataError, OmniError
from omnilit.logging import get_logger

log = get_logger(__name__)

SHARD_BYTES: Final = 16 * 2**20
SHARD_ROWS: Final = 500  # where bytes are not known
MAX_SHARDS: Final = 1024
MAX_ROW_SHARDS: Final = 64  # where every reader reads all files
KEYS: Final = {
    "seed": "train.seed",
    "buffer_size": "data.dyn_bsz_buffer_size",
    "samples_per_item": "train.dyn_bsz or train.micro_batch_size",
    "drop_last": "data.dataloader.drop_last",
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
        """Equal for equal sources and an equal transform; of contents a sample is looked at."""
        files = [[(f.format, sampled_fingerprint(f)) for f in found] for found in self.files]
        mixture = replace(
            self.mixture, sources=tuple(s._replace(path="") for s in self.mixture.sources)
        )
        text = repr((mixture, files, self.tokens))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def sizes(self) -> list[list[int | None]]:
        """Bytes of each source's files; None where they are not known."""
        return [[file_size(file) for file in found] for found in self.files]


def count_shards(files: Sequence[Sequence[DataFile]]) -> int:
    """Virtual shards of some sources: a power of two that depends on the data alone.

    A shard is about 16 MiB. There are at most `MAX_ROW_SHARDS`, unless the files of every source
    can be dealt evenly to more. Where sizes are not known, the beginning of the data is counted.
    """
    sizes = [[file_size(file) for file in found] for found in files]
    known = [size for found in sizes for size in found if size is not None]
    if len(known) < sum(map(len, sizes)):
        rows = [sum(1 for _ in islice(_all_rows(found), BLOCK_ROWS)) for found in files]
        return MAX_ROW_SHARDS if max(rows) == BLOCK_ROWS else _power_of_two(sum(rows) / SHARD_ROWS)
    number = min(_power_of_two(sum(known) / SHARD_BYTES), MAX_SHARDS)
    while number > MAX_ROW_SHARDS and any(deal_files(found, number) is None for found in sizes):
        number //= 2
    return number


def _all_rows(files: Sequence[DataFile]) -> Iterator[object]:
    return chain.from_iterable(map(read_rows, files))


def _power_of_two(number: float) -> int:
    """The largest one that is not above `number`; at least 1."""
    return 2 ** math.floor(math.log2(max(number, 1)))


class StreamedItems:
    """Micro-batches of data that is tokenised while it is trained on; an `ItemStream`.

    Item k of a pass comes from shard k mod V. So where V is a multiple of ranks times workers,
    each of them reads shards of its own; elsewhere it follows more shards than it takes items of.
    The order depends on the data and the settings alone.

    A shard that has ended its pass gives empty items until all have: then the next pass begins
    everywhere, reshuffled, so that no record comes twice before all came once. Who has ended
    travels with the sums of each window.

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
        self._pass_starts = [0]
        self._num_items = 1  # of a window, as `fetch` was told
        self._num_ended = 0.0  # shards that have nothing left of the pass
        self._has_ended = False
        self._totals: Counter[str] = Counter()
        self._samples_before = 0.0  # of earlier passes
        self._fingerprint = data.fingerprint()
        self._sizes = data.sizes()

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
        """See `ItemStream`; what workers made ahead of a pass's end is thrown away."""
        self._num_items = layout.num_items
        self._warn_of_readers(layout)
        position, left = start, num_windows
        while left:
            fetched = self._fetch_pass(position, left, layout)
            for _ in range(left):
                yield from islice(fetched, layout.window_size)
                left -= 1
                if self._has_ended:  # `commit` has seen the window
                    position = Position(position.pass_index + 1, 0)
                    break

    def _fetch_pass(
        self, start: Position, num_windows: int, layout: WindowLayout
    ) -> Iterator[Fetched]:
        source = _Items(
            self.data,
            self.settings,
            self._collate,
            states=dict(self._states),
            sizes=self._sizes,
            pass_starts=tuple(self._pass_starts),
            pass_index=start.pass_index,
            numbers=_item_numbers(start, num_windows, layout),
        )
        loader = DataLoader(source, **loader_arguments(self._workers))
        return map(raise_failed, run_loader(loader))

    def _warn_of_readers(self, layout: WindowLayout) -> None:
        shards, readers = self.settings.num_shards, max(self._workers.num_workers, 1)
        readers *= layout.data_size
        if readers > shards:
            log.info(
                "datasets_type iterable: %d readers share %d virtual shards, so records are read "
                "and tokenised more than once; larger data, or fewer readers, would not",
                readers,
                shards,
            )
        names = self.data.mixture.names
        pairs = zip(names, self._sizes, strict=True)
        dealt = [name for name, sizes in pairs if deal_files(sizes, shards) is None]
        if readers > 1 and dealt:
            log.info(
                "datasets_type iterable: each of %d readers reads all files of %s; at least %d "
                "files of about one size would be read once",
                readers,
                ", ".join(dealt),
                shards,
            )

    def empty(self) -> Fetched:
        """See `ItemStream`."""
        return Fetched(make_batch((), self._collate), None, dict.fromkeys(COUNTS, 0.0))

    def open(self, position: Position) -> Position:
        """The same: a pass's end is known when its last window is dealt."""
        return position

    def advance(self, start: Position, num_items: int) -> Position:
        """See `ItemStream`."""
        if self._has_ended:
            return Position(start.pass_index + 1, 0)
        return Position(start.pass_index, start.items + num_items)

    def count_windows(self, start: Position, num_items: int) -> None:
        """Not known."""

    def commit(
        self,
        window: Sequence[Fetched],
        sums: Mapping[str, float],
        *,
        start: Position,
        is_last: bool,
    ) -> None:
        """Remember where shards are, hand on skipped records, and stop at too many."""
        if self._has_ended:
            self._has_ended, self._num_ended = False, 0.0
            self._samples_before = self._totals[SAMPLES]
        for one in window:
            shard, state, bad = one.state
            self._states[shard] = state
            if bad and self._on_bad is not None:
                self._on_bad(bad)
        self._totals.update(sums)
        self._num_ended += sums[ENDED]
        if self._num_ended >= self.settings.num_shards:
            self._end_pass(start)
        is_first_end = self._has_ended and len(self._pass_starts) == 2
        if is_last or is_first_end:
            log.info("stream: %s", ", ".join(self._describe()))
        check_bad_fraction(
            self._totals[BAD],
            self._totals[RECORDS],
            limit=self._limit,
            is_final=is_last or self._has_ended,
        )

    def _end_pass(self, start: Position) -> None:
        self._has_ended = True
        self._pass_starts.append(self._pass_starts[-1] + start.items + self._num_items)
        if self._totals[SAMPLES] == self._samples_before:
            raise DataError(
                problem="a whole pass gave no record that can be trained",
                fix="look at the data with omnilit data",
                file=", ".join(self.data.mixture.names),
            )

    def _describe(self) -> Iterator[str]:
        """What was read so far, over all ranks, and what became of it."""
        shown = (name for name in COUNTS if name != ENDED)
        return (f"{self._totals[name]:,.0f} {name}" for name in shown if self._totals[name])

    def state_dict(self) -> dict[str, object]:
        """See `ItemStream`."""
        before = self._totals[SAMPLES] if self._has_ended else self._samples_before
        return {
            "stream": asdict(self.settings),
            "data": self._fingerprint,
            "shards": dict(self._states),
            "pass_starts": list(self._pass_starts),
            "totals": dict(self._totals),
            "samples_before": before,
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See `ItemStream`; the number of shards and a warm-up stay as they were."""
        saved = dict(states[0]["stream"])
        same_data = states[0]["data"] == self._fingerprint
        budget = resumed_budget(saved, asdict(self.settings), KEYS, has_same_data=same_data)
        self.settings = replace(self.settings, budget=budget, num_shards=saved["num_shards"])
        self._pass_starts = list(states[0]["pass_starts"])
        self._totals = Counter(states[0]["totals"])
        self._samples_before = states[0]["samples_before"]
        self._has_ended = False
        newest: dict[int, ShardState] = {}
        for state in states:
            for shard, plain in state["shards"].items():
                found = ShardState.of(plain)
                if shard not in newest or newest[shard].age < found.age:
                    newest[shard] = found
        self._states = {shard: state.to_plain() for shard, state in newest.items()}
        current = len(self._pass_starts) - 1
        self._num_ended = float(sum(s.has_ended(current) for s in newest.values()))


class _Items(IterableDataset[Fetched | OmniError]):
    """The items of a pass that a rank needs; in a worker, those that it makes."""

    def __init__(
        self,
        data: StreamData,
        settings: StreamSettings,
        collate: CollateSettings,
        *,
        states: Mapping[int, list[object]],
        sizes: Sequence[Sequence[int | None]],
        pass_starts: tuple[int, ...],
        pass_index: int,
        numbers: Sequence[int],
    ) -> None:
        self._data, self._settings, self._collate = data, settings, collate
        self._states, self._sizes, self._pass_starts = states, sizes, pass_starts
        self._pass_index, self._numbers = pass_index, numbers
        self._sources: list[SourceRows] = []
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
        shard.go_to(self._pass_index, number // num_shards)
        item = shard.next_item()
        counts = {name: float(item.counts.get(name, 0)) for name in COUNTS}
        batch, bad = make_or_skip(item.samples, self._collate)
        counts[BAD] += len(bad)
        return Fetched(batch, (index, item.state, (*item.bad, *bad)), counts)

    def _open(self, index: int) -> Shard:
        if index not in self._shards:
            self._sources = self._sources or self._open_sources()
            shard = Shard(
                index,
                mixture=self._data.mixture,
                sources=self._sources,
                transform=self._data.transform,
                settings=self._settings,
                pass_starts=self._pass_starts,
            )
            if (state := self._states.get(index)) is not None:
                shard.restore(ShardState.of(state))
            self._shards[index] = shard
        return self._shards[index]

    def _open_sources(self) -> list[SourceRows]:
        return [
            SourceRows(
                files,
                sizes,
                index=index,
                num_shards=self._settings.num_shards,
                seed=self._settings.seed,
                is_shared=len(self._data.files) > 1,
            )
            for index, (files, sizes) in enumerate(zip(self._data.files, self._sizes, strict=True))
        ]


def _item_numbers(start: Position, num_windows: int, layout: WindowLayout) -> range:
    """The items of a rank: every `data_size`-th of all windows."""
    first = start.items + layout.data_rank
    return range(first, start.items + num_windows * layout.num_items, layout.data_size)
