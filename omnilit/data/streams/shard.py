"""One virtual shard of streamed data: its rows in order, packed to items, resumable anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from omnilit.data.multisource import Mixture
from omnilit.data.packing import FirstFit
from omnilit.data.quarantine import BadRecord
from omnilit.data.readers import parse_row
from omnilit.data.streams.rows import Row, SourceRows
from omnilit.data.streams.state import Place, ShardState, StreamSettings
from omnilit.data.transforms import Outcome, Transform, encode_or_skip
from omnilit.errors import DataError
from omnilit.types import Sample

RECORDS, SAMPLES, BAD, ENDED = "records", "samples", "bad", "ended"
TRUNCATED, CUT, DROPPED, UNSUPERVISED = "truncated", "cut", "dropped", "unsupervised"
COUNTS: Final = (RECORDS, SAMPLES, BAD, TRUNCATED, CUT, DROPPED, UNSUPERVISED, ENDED)


class Item(NamedTuple):
    """One item of a shard.

    Args:
        samples: What it holds; nothing where the shard waits for others to end their pass.
        state: Of the shard behind it, from `ShardState.to_plain`.
        counts: Of `COUNTS`, those that are not 0: what became of the records read for it, and
            whether it is the shard's last one of the pass.
        bad: Records that were skipped.
    """

    samples: list[Sample]
    state: list[object]
    counts: Mapping[str, float]
    bad: tuple[BadRecord, ...]


class Shard:
    """Makes the items of one shard, pass after pass.

    A pass ends where the mixture says so; then the shard gives empty items until it is told to
    begin the next one. With `first_exhausted` a source that was not used up goes on there.

    Args:
        index: Of the shard.
        mixture: The sources and how they are mixed.
        sources: The rows of each, which the shards of a reader share.
        transform: Tokenises.
        settings: Seed, packing, number of shards.
        pass_starts: Items on all shards before each pass begins, for the budget's warm-up.
    """

    def __init__(
        self,
        index: int,
        *,
        mixture: Mixture,
        sources: Sequence[SourceRows],
        transform: Transform,
        settings: StreamSettings,
        pass_starts: Sequence[int] = (0,),
    ) -> None:
        self.index, self._mixture, self._sources = index, mixture, sources
        self._transform, self._settings = transform, settings
        self._pass_starts = pass_starts
        self._weights = np.array([source.weight for source in mixture.sources])
        self._held: dict[int, tuple[tuple[int, int], list[Row] | None]] = {}
        self._buffer = FirstFit[tuple[Place, Sample]]()
        self._counts: Counter[str] = Counter()
        self._bad: list[BadRecord] = []
        self._checked: set[str] = set()
        self.state = ShardState.fresh(len(sources))
        self._absent = [self._peek(source) is None for source in range(len(sources))]
        self._see_end()

    def restore(self, state: ShardState) -> None:
        """Go on behind a saved item: what waited then is read again."""
        self.state = state
        self._buffer = FirstFit()
        found: dict[tuple[int, int, int, int], list[Sample]] = {}
        for key in sorted(place[:4] for place, _ in state.waiting):
            if key not in found:
                source, round_index, block, row = key
                rows = self._sources[source].get(self.index, round_index, block)
                assert rows is not None, "the data is what it was: its fingerprint is"
                found[key] = self._encode(source, rows[row])
        for place, size in state.waiting:
            self._buffer.add((place, found[place[:4]][place.chunk]), size)
        self._bad, self._counts = [], Counter()

    def go_to(self, pass_index: int, items: int) -> None:
        """Pass over items that others make, up to item `items` of a pass."""
        while self.state.pass_index < pass_index:
            while not self._is_done():
                self.next_item()
            self._begin_pass()
        while self.state.items < items:
            self.next_item()

    def next_item(self) -> Item:
        """The next item.

        Raises:
            DataError: A record is bad and must not be skipped, or no source gives anything.
        """
        was_done = self._is_done() and self.state.items > 0
        samples = [sample for _, sample in self._pick()]
        while not self._buffer.entries and self._take_row():
            pass  # so that the last item knows that it is the last
        self.state.items += 1
        if self._is_done() and not was_done:
            self._counts[ENDED] += 1
        self._counts[SAMPLES] += len(samples)
        self.state.waiting = [(place, size) for (place, _), size in self._buffer.entries]
        item = Item(samples, self.state.to_plain(), dict(self._counts), tuple(self._bad))
        self._bad, self._counts = [], Counter()
        return item

    def _is_done(self) -> bool:
        """Whether nothing is left of the pass."""
        return self.state.is_over and not self._buffer.entries

    def _begin_pass(self) -> None:
        state = self.state
        state.pass_index, state.items, state.is_over = state.pass_index + 1, 0, False
        state.ended = [False] * len(self._sources)
        if self._mixture.stopping == "all_exhausted":
            for source in range(len(self._sources)):
                if state.blocks[source] or state.rows[source]:
                    self._end_round(source)
        self._see_end()

    def _pick(self) -> list[tuple[Place, Sample]]:
        settings, buffer, state = self._settings, self._buffer, self.state
        before = self._pass_starts[min(state.pass_index, len(self._pass_starts) - 1)]
        item = before + state.items * settings.num_shards + self.index
        budget, number = settings.budget.budget(item), settings.samples_per_item
        while True:
            if number is not None and len(buffer.entries) >= number:
                return buffer.take_first(number)
            if number is None and buffer.is_ready(settings.buffer_size, budget):
                return buffer.take(budget)
            if self._take_row():
                continue
            if number is None:  # the pass ends: what waits is packed before the next begins
                return buffer.take(budget)
            rest = buffer.take_first(number)
            return [] if settings.drop_last else rest

    def _take_row(self) -> bool:
        """Read one more row into the buffer; False where the pass is over."""
        state = self.state
        if state.is_over:
            return False
        source = self._draw()
        row = self._peek(source)
        assert row is not None, "a source that is used up begins its next round at once"
        place = (source, state.rounds[source], state.blocks[source], state.rows[source])
        for chunk, sample in enumerate(self._encode(source, row)):
            self._buffer.add((Place(*place, chunk), sample), len(sample))
            state.tokens[source] += len(sample)
            state.samples[source] += 1
        state.drawn[source] += 1
        state.rows[source] += 1
        if self._peek(source) is None:
            self._end_round(source)
            state.ended[source] = True
            self._see_end()
        return True

    def _end_round(self, source: int) -> None:
        state = self.state
        state.rounds[source] += 1
        state.blocks[source] = state.rows[source] = 0

    def _see_end(self) -> None:
        """Notice that the pass has ended."""
        state = self.state
        ended = [e for e, absent in zip(state.ended, self._absent, strict=True) if not absent]
        if self._mixture.stopping == "never_exhausted" and len(self._sources) > 1 and ended:
            if all(state.rounds[s] or a for s, a in enumerate(self._absent)):
                self._see_something()
            return
        is_first = self._mixture.stopping != "all_exhausted"
        state.is_over = not ended or (any(ended) if is_first else all(ended))

    def _see_something(self) -> None:
        if any(self.state.samples):
            return
        raise DataError(
            problem="no record of any source can be trained",
            fix="look at the data with omnilit data",
            file=", ".join(self._mixture.names),
        )

    def _draw(self) -> int:
        """The source of the next record."""
        if len(self._sources) == 1:
            return 0
        state = self.state
        units = state.tokens if self._mixture.level == "token" else state.samples
        # a record that is cut in chunks is several samples, and each source has its own mean
        means = [u / n if u else 0.0 for u, n in zip(units, state.drawn, strict=True)]
        known = [mean for mean in means if mean] or [1.0]
        typical = sum(known) / len(known)
        shares = self._weights / [mean or typical for mean in means]
        shares[self._absent] = 0.0
        bits = np.random.Philox(np.random.SeedSequence([self._settings.seed, self.index, 1]))
        number = np.random.Generator(bits.advance(state.draws)).random()
        state.draws += 1
        drawn = np.searchsorted(np.cumsum(shares) / shares.sum(), number, side="right")
        return min(int(drawn), len(shares) - 1)

    def _peek(self, source: int) -> Row | None:
        """The next row of a source's round; None where the round is over."""
        state = self.state
        while True:
            key = (state.rounds[source], state.blocks[source])
            if source not in self._held or self._held[source][0] != key:
                self._held[source] = (key, self._sources[source].get(self.index, *key))
            rows = self._held[source][1]
            if rows is None:
                return None
            if state.rows[source] < len(rows):
                return rows[state.rows[source]]
            state.blocks[source] += 1
            state.rows[source] = 0

    def _encode(self, source: int, row: Row) -> list[Sample]:
        """The samples of a row; none where it is skipped."""
        path, raw = row
        name, is_silent = self._mixture.names[source], self._settings.is_silent
        self._counts[RECORDS] += 1
        try:
            record = parse_row(raw, file=path, source=name)
            outcome = encode_or_skip(self._transform, [record], is_silent=is_silent)
        except DataError as error:
            if not is_silent:
                raise
            outcome = Outcome([], bad=(BadRecord.of(error, source=name, file=path, row=raw.row),))
        else:
            if path not in self._checked and not outcome.bad:
                self._transform.check(record)
                self._checked.add(path)
        self._bad += outcome.bad
        self._counts[BAD] += len(outcome.bad)
        self._counts[TRUNCATED] += outcome.num_truncated
        self._counts[CUT] += outcome.num_cut
        self._counts[DROPPED] += outcome.num_dropped
        self._counts[UNSUPERVISED] += outcome.num_unsupervised
        return outcome.samples
