"""What is in a data set, in numbers: pure functions of what preparing it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from omnilit.data.quarantine import BadRecord
from omnilit.tools.data_media import HEADER as MEDIA_HEADER
from omnilit.tools.data_media import MediaCount, media_rows, merge_counts
from omnilit.tools.histogram import Histogram, bin_lengths, count_classes

Ints = npt.NDArray[np.int64]
PERCENTS: Final = (1, 50, 90, 99)
MAX_LISTED: Final = 20  # bad records that are listed, of any number
ALL: Final = "all"
RECORDS_HEADER: Final = (
    "source", "records", "samples", "duplicates", "truncated", "cut turns", "dropped",
    "unsupervised", "bad",
)  # fmt: skip
TOKENS_HEADER: Final = (
    "source", "tokens", "supervised", "share", *(f"p{p}" for p in PERCENTS), "max",
)  # fmt: skip
BAD_HEADER: Final = ("where", "reason", "fix")


class Table(NamedTuple):
    """A title, the names of the columns, and rows of cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class SourceData:
    """What preparing one source found; arrays have one entry a sample.

    Args:
        name: Of the source.
        lengths: Tokens; int64 [n].
        num_targets: Supervised tokens; int64 [n].
        digests: Equal for samples of equal contents; [n].
        num_records: Records read, bad ones among them.
        num_truncated: Records that lost tokens or messages to `max_seq_len`.
        num_cut: Those of them that end or begin within a message.
        num_dropped: Records left out for their length.
        num_unsupervised: Records left out because truncation left nothing to train.
        num_bad: Records that cannot be used.
        labels: Class ids, for classification; int64 [n].
        pair_starts: Tokens of the chosen answer's sequence, for dpo; int64 [n].
        media: Its images, videos and sounds, by kind.
    """

    name: str
    lengths: Ints
    num_targets: Ints
    digests: npt.NDArray[np.generic]
    num_records: int
    num_truncated: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    num_unsupervised: int = 0
    num_bad: int = 0
    labels: Ints | None = None
    pair_starts: Ints | None = None
    media: tuple[MediaCount, ...] = ()


@dataclass(frozen=True, slots=True)
class Packing:
    """How full the micro-batches of a pass are.

    Args:
        num_micro_batches: Of the first pass.
        num_tokens: Real tokens in them.
        budget: Tokens that each may hold; None where a micro-batch is a number of samples.
        way: How it was packed, in words.
    """

    num_micro_batches: int
    num_tokens: int
    budget: int | None
    way: str

    @property
    def padding_share(self) -> float | None:
        """Share of the budgets that holds no token; None where there is no budget."""
        room = (self.budget or 0) * self.num_micro_batches
        return 1 - self.num_tokens / room if room else None


class PassShare(NamedTuple):
    """What one source gives to a pass of a mixture."""

    name: str
    num_samples: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PartReport:
    """The training data or the evaluation data.

    Args:
        title: Which of the two.
        sources: One a source.
        packing: None where nothing is packed.
        shares: What each source of a mixture gives to a pass.
        bad: The first bad records, at most `MAX_LISTED`.
        notes: What a reader of the numbers must know.
        failures: Why sources cannot be prepared at all.
        damaged: Media that cannot be decoded, at most `MAX_LISTED`.
        num_damaged: All of these; None where they were not decoded.
    """

    title: str
    sources: tuple[SourceData, ...]
    packing: Packing | None = None
    shares: tuple[PassShare, ...] = ()
    bad: tuple[BadRecord, ...] = ()
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    damaged: tuple[BadRecord, ...] = ()
    num_damaged: int | None = None

    @property
    def num_records(self) -> int:
        """Records read, bad ones among them."""
        return sum(source.num_records for source in self.sources)

    @property
    def num_bad(self) -> int:
        """Records that cannot be used."""
        return sum(source.num_bad for source in self.sources)

    @property
    def lengths(self) -> Ints:
        """Tokens of each sample, over all sources."""
        return _join([source.lengths for source in self.sources])


def percentile(values: Ints, percent: int) -> int:
    """The least value that at least `percent` of 100 of all values do not exceed; 0 of none."""
    if not len(values):
        return 0
    rank = -(-percent * len(values) // 100)  # rounded up
    return int(np.partition(values, rank - 1)[rank - 1])


def count_duplicates(digests: npt.NDArray[np.generic]) -> int:
    """Entries that are equal to an earlier one."""
    return len(digests) - len(np.unique(digests))


def merge_sources(sources: Sequence[SourceData]) -> SourceData:
    """All sources as one, so that a sample that stands in two of them is a duplicate."""
    return SourceData(
        ALL,
        lengths=_join([s.lengths for s in sources]),
        num_targets=_join([s.num_targets for s in sources]),
        digests=np.concatenate([s.digests for s in sources]),
        num_records=sum(s.num_records for s in sources),
        num_truncated=sum(s.num_truncated for s in sources),
        num_cut=sum(s.num_cut for s in sources),
        num_dropped=sum(s.num_dropped for s in sources),
        num_unsupervised=sum(s.num_unsupervised for s in sources),
        num_bad=sum(s.num_bad for s in sources),
        labels=_join_known([s.labels for s in sources]),
        pair_starts=_join_known([s.pair_starts for s in sources]),
        media=merge_counts(one for s in sources for one in s.media),
    )


def build_tables(part: PartReport) -> list[Table]:
    """The tables of a part: records, tokens, media, the mixture's pass, packing, bad records."""
    rows = list(part.sources)
    if len(rows) > 1:
        rows.append(merge_sources(part.sources))
    tables = [
        Table(f"{part.title}: records", RECORDS_HEADER, tuple(map(_record_row, rows))),
        Table(f"{part.title}: tokens", TOKENS_HEADER, tuple(map(_token_row, rows))),
    ]
    if any(row.media for row in rows):
        tables.append(_media_table(part.title, rows))
    if part.shares:
        tables.append(_share_table(part))
    if part.packing is not None:
        tables.append(_packing_table(part.title, part.packing))
    if part.bad:
        tables.append(_bad_table(f"{part.title}: bad records", part.bad, part.num_bad))
    if part.damaged:
        title = f"{part.title}: damaged images, videos and sounds"
        tables.append(_bad_table(title, part.damaged, part.num_damaged or 0))
    # where there are no tokens, as for diffusion, zeros would say nothing
    return [table for table in tables if table.header is not TOKENS_HEADER or len(part.lengths)]


def build_histograms(part: PartReport) -> list[Histogram]:
    """Lengths of all samples; of both answers for dpo; and the classes of classification."""
    whole = merge_sources(part.sources)
    if not len(whole.lengths):
        return []
    found = [bin_lengths(whole.lengths, f"{part.title}: tokens of a sample")]
    if whole.pair_starts is not None:
        rejected = whole.lengths - whole.pair_starts
        found = [
            bin_lengths(whole.pair_starts, f"{part.title}: tokens of the chosen answer's sequence"),
            bin_lengths(rejected, f"{part.title}: tokens of the rejected answer's sequence"),
        ]
    if whole.labels is not None:
        found.append(count_classes(whole.labels, f"{part.title}: samples of a class"))
    return found


def _record_row(source: SourceData) -> tuple[str, ...]:
    numbers = (
        source.num_records,
        len(source.lengths),
        count_duplicates(source.digests),
        source.num_truncated,
        source.num_cut,
        source.num_dropped,
        source.num_unsupervised,
        source.num_bad,
    )
    return (source.name, *(f"{number:,}" for number in numbers))


def _token_row(source: SourceData) -> tuple[str, ...]:
    tokens, targets = int(source.lengths.sum()), int(source.num_targets.sum())
    percentiles = (percentile(source.lengths, p) for p in (*PERCENTS, 100))
    return (
        source.name,
        f"{tokens:,}",
        f"{targets:,}",
        format_share(targets, tokens),
        *(f"{value:,}" for value in percentiles),
    )


def _share_table(part: PartReport) -> Table:
    samples = sum(share.num_samples for share in part.shares)
    tokens = sum(share.num_tokens for share in part.shares)
    rows = tuple(
        (
            share.name,
            f"{share.num_samples:,}",
            format_share(share.num_samples, samples),
            f"{share.num_tokens:,}",
            format_share(share.num_tokens, tokens),
        )
        for share in part.shares
    )
    header = ("source", "samples", "share", "tokens", "share of tokens")
    return Table(f"{part.title}: first pass of the mixture", header, rows)


def _packing_table(title: str, packing: Packing) -> Table:
    padding = packing.padding_share
    rows = [
        ("way", packing.way),
        ("micro-batches of a pass", f"{packing.num_micro_batches:,}"),
        ("tokens in them", f"{packing.num_tokens:,}"),
    ]
    if packing.budget is not None and padding is not None:
        rows += [
            ("tokens that one may hold", f"{packing.budget:,}"),
            ("efficiency", f"{100 * (1 - padding):.3f} %"),
            ("padding share", f"{100 * padding:.3f} %"),
        ]
    return Table(f"{title}: packing", ("what", "value"), tuple(rows))


def _media_table(title: str, rows: Sequence[SourceData]) -> Table:
    found = [line for row in rows for line in media_rows(row.name, row.media, row.lengths.sum())]
    return Table(f"{title}: images, videos and sounds", MEDIA_HEADER, tuple(found))


def _bad_table(title: str, bad: Sequence[BadRecord], number: int) -> Table:
    more = f", the first {len(bad)} of {number:,}" if number > len(bad) else ""
    return Table(f"{title}{more}", BAD_HEADER, bad_rows(bad))


def bad_rows(records: Sequence[BadRecord]) -> tuple[tuple[str, ...], ...]:
    """A row for each bad record, of the columns of `BAD_HEADER`."""
    return tuple(
        (f"{bad.file}:{bad.row}", shorten(bad.reason), shorten(bad.fix)) for bad in records
    )


def shorten(text: str, limit: int = 300) -> str:
    """`text` on one line, of at most `limit` characters, without anything unprintable."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def format_share(part: float, whole: float) -> str:
    """A part as percent of the whole; `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _join(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _join_known(arrays: Sequence[Ints | None]) -> Ints | None:
    known = [array for array in arrays if array is not None]
    return _join(known) if known else None
