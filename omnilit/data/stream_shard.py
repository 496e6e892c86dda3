"""One virtual shard of streamed data: its rows in order, packed to items, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from omnilit.data.files import DataFile
from omnilit.data.multisource import Mixture
from omnilit.data.packing import FirstFit
from omnilit.data.quarantine import BadRecord
from omnilit.data.readers import RawRow, parse_row, read_rows
from omnilit.data.transforms import Transform, encode_or_skip
from omnilit.data.warmup import BudgetSchedule
from omnilit.errors import DataError
from omnilit.types import Record, Sample

BLOCK_ROWS = 10_000  # rows that are shuffled together, over all shards


class Place(NamedTuple):
    """Where a sample comes from, in numbers that find it again.

    Args:
        source: Index of the source.
        round: Trips through the source before this one.
        row: Of the shard's rows of that source, 0-based, in shuffled order.
        chunk: Which of the row's samples.
    """

    source: int
    round: int
    row: int
    chunk: int


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What the items of a stream depend on.

    Args:
        seed: Of everything random.
        budget: Tokens that an item may hold.
        num_shards: Virtual shards.
        buffer_size: Samples to choose from before an item is packed.
        samples_per_item: Given, an item is so many samples in their order.
        is_silent: Skip bad records.
    """

    seed: int
    budget: BudgetSchedule
    num_shards: int = 1
    buffer_size: int = 200
    samples_per_item: int | None = None
    is_silent: bool = False


@dataclass(slots=True)
class ShardState:
    """How far a shard is, as plain numbers.

    Args:
        items: Items that it made.
        pass_index: Trips through its rows that are over.
        rows: Rows taken of each source, in its present round.
        rounds: Rounds of each source in this pass that are over.
        draws: Sources drawn in this pass.
        tokens: Tokens delivered of each source, for mixing by tokens.
        samples: Samples delivered of each source, likewise.
        waiting: Samples read and not yet in an item, with their lengths.
    """

    items: int = 0
    pass_index: int = 0
    rows: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    draws: int = 0
    tokens: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    waiting: list[tuple[Place, int]] = field(default_factory=list)

    def to_plain(self) -> list[object]:
        """For a checkpoint."""
        waiting = [[*place, size] for place, size in self.waiting]
        numbers = [list(n) for n in (self.rows, self.rounds, self.tokens, self.samples)]
        return [self.items, self.pass_index, self.draws, *numbers, waiting]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> ShardState:
        """From `to_plain`."""
        items, pass_index, draws, rows, rounds, tokens, samples, waiting = plain
        return cls(
            items,
            pass_index,
            list(rows),
            list(rounds),
            draws,
            list(tokens),
            list(samples),
            [(Place(*row[:4]), row[4]) for row in waiting],
        )


class Item(NamedTuple):
    """One item of a shard.

    Args:
        samples: What it holds.
        state: Of the shard behind it, from `ShardState.to_plain`.
        num_records: Records read for it.
        bad: Those of them that were skipped.
    """

    samples: list[Sample]
    state: list[object]
    num_records: int
    bad: tuple[BadRecord, ...]


class SourceRows:
    """A shard's rows of one source, shuffled block by block.

    Where the source has at least as many files as there are shards, they are whole files, so
    that nothing is read in vain; else every `num_shards`-th row.

    Args:
        name: Of the source.
        files: In order.
        index: Of the source.
        shard: Which shard.
        settings: Seed and number of shards.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[DataFile],
        *,
        index: int,
        shard: int,
        settings: StreamSettings,
    ) -> None:
        self.name, self.index = name, index
        self._files, self._shard, self._settings = files, shard, settings
        self._block_size = max(1, BLOCK_ROWS // settings.num_shards)
        self._block: list[tuple[str, RawRow]] = []
        self._block_key = (-1, -1)
        self._reader: Iterator[tuple[str, RawRow]] = iter(())
        self._read_blocks = -1  # blocks that the reader has given

    def get(self, round_index: int, row: int) -> tuple[str, RawRow] | None:
        """Row `row` of a round with its file, or None behind the last one."""
        block, place = divmod(row, self._block_size)
        if (round_index, block) != self._block_key:
            self._block = self._load(round_index, block)
            self._block_key = (round_index, block)
        return self._block[place] if place < len(self._block) else None

    def _load(self, round_index: int, block: int) -> list[tuple[str, RawRow]]:
        if self._read_blocks != block:  # not simply the next one
            rows = self._iterate()
            self._reader = islice(rows, block * self._block_size, None)
        found = list(islice(self._reader, self._block_size))
        self._read_blocks = block + 1
        settings = self._settings
        key = (settings.seed, self._shard, self.index, round_index, block)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        return [found[i] for i in rng.permutation(len(found))]

    def _iterate(self) -> Iterator[tuple[str, RawRow]]:
        """The shard's rows in the order of the files."""
        num_shards, number = self._settings.num_shards, 0
        if len(self._files) >= num_shards:
            for file in self._files[self._shard :: num_shards]:
                for raw in read_rows(file):
                    yield file.path, raw
            return
        for file in self._files:
            for raw in read_rows(file):
                if number % num_shards == self._shard:
                    yield file.path, raw
                number += 1


class Shard:
    """Makes the items of one shard, one after another, for ever.

    Args:
        index: Of the shard.
        mixture: The sources and how they are mixed.
        files: Of each source.
        transform: Tokenises.
        settings: Seed, packing, number of shards.
    """

    def __init__(
        self,
        index: int,
        *,
        mixture: Mixture,
        files: Sequence[Sequence[DataFile]],
        transform: Transform,
        settings: StreamSettings,
    ) -> None:
        self.index, self._mixture = index, mixture
        self._transform, self._settings = transform, settings
        self._sources = [
            SourceRows(name, found, index=i, shard=index, settings=settings)
            for i, (name, found) in enumerate(zip(mixture.names, files, strict=True))
        ]
        self._buffer = FirstFit[tuple[Place, Sample]]()
        self._bad: list[BadRecord] = []
        self._num_records = 0
        self.state = self._fresh(ShardState())

    def restore(self, state: ShardState) -> None:
        """Go on behind a saved item: what waited then is read again."""
        self.state = state
        self._buffer = FirstFit()
        found: dict[tuple[int, int, int], list[Sample]] = {}
        for place, size in state.waiting:
            key = place[:3]
            if key not in found:
                found[key] = self._read(*key) or []
            self._buffer.add((place, found[key][place.chunk]), size)
        self._bad, self._num_records = [], 0

    def next_item(self) -> Item:
        """The next item.

        Raises:
            DataError: A record is bad and must not be skipped, or a whole pass gave nothing.
        """
        picked = self._pick()
        state = self.state
        state.items += 1
        state.waiting = [(place, size) for (place, _), size in self._buffer.entries]
        item = Item(
            [sample for _, sample in picked],
            state.to_plain(),
            self._num_records,
            tuple(self._bad),
        )
        self._bad, self._num_records = [], 0
        return item

    def _pick(self) -> list[tuple[Place, Sample]]:
        settings, buffer = self._settings, self._buffer
        item = self.state.items * settings.num_shards + self.index
        budget = settings.budget.budget(item)
        number, empty_passes = settings.samples_per_item, 0
        while True:
            if number is not None and len(buffer.entries) >= number:
                return buffer.take_first(number)
            if number is None and buffer.is_ready(settings.buffer_size, budget):
                return buffer.take(budget)
            if self._take_row():
                continue
            if buffer.entries:  # the pass ends: what waits is packed before the next begins
                return buffer.take(budget) if number is None else buffer.take_first(number)
            self.state = self._fresh(self.state)
            empty_passes += 1
            if empty_passes > 1:
                raise DataError(
                    problem="a whole pass gave no record that can be trained",
                    fix="look at the data with omnilit data",
                    file=", ".join(source.name for source in self._sources),
                )

    def _fresh(self, state: ShardState) -> ShardState:
        """The state at the beginning of the next pass."""
        num = len(self._mixture.sources)
        is_first = not state.rows
        return ShardState(
            items=state.items,
            pass_index=0 if is_first else state.pass_index + 1,
            rows=[0] * num,
            rounds=[0] * num,
            tokens=state.tokens or [0] * num,
            samples=state.samples or [0] * num,
        )

    def _take_row(self) -> bool:
        """Read one more row into the buffer; False where the pass is over."""
        state = self.state
        if self._is_over():
            return False
        source = self._draw()
        found = self._read(source, self._round(source), state.rows[source])
        if found is None:
            state.rounds[source] += 1
            state.rows[source] = 0
            return not self._is_over()
        state.draws += 1
        place = (source, self._round(source), state.rows[source])
        state.rows[source] += 1
        for chunk, sample in enumerate(found):
            self._buffer.add((Place(*place, chunk), sample), len(sample))
            state.tokens[source] += len(sample)
            state.samples[source] += 1
        return True

    def _is_over(self) -> bool:
        """Whether the pass has ended: asked for a row that is not there."""
        rounds, stopping = self.state.rounds, self._mixture.stopping
        if stopping == "never_exhausted" and len(rounds) > 1:
            return min(rounds) > 0 and not any(self.state.samples)  # nothing in any source
        return all(rounds) if stopping == "all_exhausted" else any(rounds)

    def _draw(self) -> int:
        """The source of the next record."""
        if len(self._sources) == 1:
            return 0
        state = self.state
        weights = np.array([source.weight for source in self._mixture.sources])
        if self._mixture.level == "token":
            means = [t / n if n else 1.0 for t, n in zip(state.tokens, state.samples, strict=True)]
            known = [m for m, n in zip(means, state.samples, strict=True) if n] or [1.0]
            typical = sum(known) / len(known)
            means = [m if n else typical for m, n in zip(means, state.samples, strict=True)]
            weights = weights / means
        key = (self._settings.seed, self.index, state.pass_index, 1)
        draws = state.draws + sum(state.rounds)
        bits = np.random.Philox(np.random.SeedSequence(key)).advance(draws)
        number = np.random.Generator(bits).random()
        return int(np.searchsorted(np.cumsum(weights) / weights.sum(), number, side="right"))

    def _round(self, source: int) -> int:
        """The round of a source over all passes, so that each has another order."""
        return self.state.pass_index * 1_000_003 + self.state.rounds[source]

    def _read(self, source: int, round_index: int, row: int) -> list[Sample] | None:
        """The samples of a row; None behind the last one, nothing where it is skipped."""
        rows = self._sources[source]
        found = rows.get(round_index, row)
        if found is None:
            return None
        path, raw = found
        self._num_records += 1
        try:
            record: Record = parse_row(raw, file=path, source=rows.name)
            outcome = encode_or_skip(self._transform, [record], is_silent=self._settings.is_silent)
        except DataError as error:
            if not self._settings.is_silent:
                raise
            self._bad.append(BadRecord.of(error, source=rows.name, file=path, row=raw.row))
            return []
        self._bad += outcome.bad
        return outcome.samples
