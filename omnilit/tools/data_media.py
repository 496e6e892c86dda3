"""The images, videos and sounds of a data set: how many, how large, and what they take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from omnilit.data.cache import TokenDataset
from omnilit.data.media.plans import decode_media
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.quarantine import BadRecord
from omnilit.errors import DataError
from omnilit.types import MODALITIES

HEADER: Final = (
    "source", "kind", "number", "samples with any", "tokens", "share of all", "tokens each p50",
    "max", "smallest", "largest",
)  # fmt: skip


class Size(NamedTuple):
    """How large a medium is.

    Args:
        measure: Pixels, frames or seconds.
        text: In words.
    """

    measure: float
    text: str


@dataclass(frozen=True, slots=True)
class MediaCount:
    """The media of one kind.

    Args:
        kind: A key of `MODALITIES`.
        num_samples: Those that have any.
        tokens: Of each medium, ascending; int64 [n].
        smallest: Of them.
        largest: Likewise.
    """

    kind: str
    num_samples: int
    tokens: npt.NDArray[np.int64]
    smallest: Size
    largest: Size


def count_media(dataset: TokenDataset, media: MediaProcessor) -> tuple[MediaCount, ...]:
    """What prepared samples hold beside text, by kind.

    Args:
        dataset: Prepared.
        media: What it was prepared with.
    """
    table = dataset.media_table()
    samples, numbers = (table[name].to_numpy() for name in ("sample", "num_tokens"))
    kinds: list[str] = table["kind"].to_pylist()
    plans: list[str] = table["plan"].to_pylist()
    found: list[MediaCount] = []
    for kind in MODALITIES:
        places = [place for place, name in enumerate(kinds) if name == kind]
        if not places:
            continue
        sizes = [_size_of(kind, json.loads(plans[i]), media.sample_rate) for i in places]
        num_samples = len(np.unique(samples[places]))
        tokens = np.sort(numbers[places].astype(np.int64))
        found.append(MediaCount(kind, num_samples, tokens, min(sizes), max(sizes)))
    return tuple(found)


def merge_counts(counts: Iterable[MediaCount]) -> tuple[MediaCount, ...]:
    """The counts of several sources as one of each kind."""
    order = list(MODALITIES)
    ordered = sorted(counts, key=lambda count: order.index(count.kind))
    groups = ((kind, list(group)) for kind, group in groupby(ordered, key=lambda one: one.kind))
    return tuple(
        MediaCount(
            kind,
            sum(one.num_samples for one in group),
            np.sort(np.concatenate([one.tokens for one in group])),
            min(one.smallest for one in group),
            max(one.largest for one in group),
        )
        for kind, group in groups
    )


def find_damaged(dataset: TokenDataset, media: MediaProcessor) -> Iterator[BadRecord]:
    """Decode all media, and tell of those that cannot be."""
    for index in np.unique(dataset.media_table()["sample"].to_numpy()).tolist():
        sample = dataset[index]
        for medium in sample.media:
            try:
                decode_media([(medium, sample.origin)], media)
            except DataError as error:
                origin = sample.origin
                yield BadRecord.of(error, source=origin.source, file=origin.file, row=origin.row)


def media_rows(name: str, counts: Iterable[MediaCount], num_tokens: int) -> list[tuple[str, ...]]:
    """Rows of `HEADER`.

    Args:
        name: Of the source.
        counts: Its media.
        num_tokens: All of its tokens.
    """
    return [
        (
            name,
            one.kind,
            f"{len(one.tokens):,}",
            f"{one.num_samples:,}",
            f"{one.tokens.sum():,}",
            f"{100 * one.tokens.sum() / num_tokens:.1f} %",
            f"{one.tokens[(len(one.tokens) - 1) // 2]:,}",
            f"{one.tokens[-1]:,}",
            one.smallest.text,
            one.largest.text,
        )
        for one in counts
    ]


def _size_of(kind: str, plan: Mapping[str, Any], sample_rate: int) -> Size:
    """The size that was seen when a medium was planned."""
    if kind == "image":
        height, width = plan["seen"]
        return Size(height * width, f"{width} x {height}")
    if kind == "video":
        taken = len(plan["indices"])
        seconds = plan["total"] / plan["fps"]
        return Size(seconds, f"{seconds:.1f} s, {plan['total']:,} frames, {taken:,} taken")
    seconds = plan["samples"] / sample_rate
    return Size(seconds, f"{seconds:.1f} s")
