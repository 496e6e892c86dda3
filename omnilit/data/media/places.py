"""The places of media in a text and among its tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from omnilit.data.encode import Tokens
from omnilit.data.media.plans import has_track, plan_medium
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.refusals import refuse
from omnilit.data.templates import Rendered
from omnilit.types import Medium, Record, Sample


class Expanded(NamedTuple):
    """A conversation with the places of its media written out.

    Args:
        rendered: The text, its spans moved along.
        media: In the order of their places, planned.
        ends: Where each place ends in the text before.
        moved: By how many characters what stands behind each of them has moved.
        before: The text before; None where it has no places.
    """

    rendered: Rendered
    media: tuple[Medium, ...] = ()
    ends: Sequence[int] = ()
    moved: Sequence[int] = ()
    before: Rendered | None = None

    def find(self, char: int) -> int:
        """Where a character of the text before stands now; -1 stays."""
        if char < 0:
            return char
        index = bisect_right(self.ends, char)
        return char + (self.moved[index - 1] if index else 0)


def expand(
    rendered: Rendered, media: Sequence[Medium], record: Record, processor: MediaProcessor
) -> Expanded:
    """Write out the places of media in a rendered conversation.

    Args:
        rendered: With one token of the processor's for each medium.
        media: In the order in which the conversation has them.
        record: It came from.
        processor: Of the model.

    Raises:
        DataError: A medium cannot be used, the model takes none of its kind, or the text has
            another number of places than there are media.
    """
    left = _by_kind(media, record, processor)
    found: list[Medium] = []
    pieces, ends, moved = [], [], []
    last = shift = 0
    for kind, (start, end) in _find(rendered.text, processor):
        medium = next(left[kind], None) if kind in left else None
        if medium is None:
            raise _uneven(record, rendered.text, media, processor)
        planned, text = plan_medium(medium, record.origin, processor)
        found.append(planned)
        pieces += [rendered.text[last:start], text]
        shift += len(text) - (end - start)
        ends.append(end)
        moved.append(shift)
        last = end
    if len(found) < len(media):
        raise _uneven(record, rendered.text, media, processor)
    _check_tracks(found, record, processor)
    written = Expanded(rendered, tuple(found), ends, moved, rendered)
    spans = [(written.find(start), written.find(end)) for start, end in rendered.spans]
    text = "".join([*pieces, rendered.text[last:]])
    return written._replace(rendered=Rendered(text, spans, rendered.weights))


def find_blocks(
    tokens: Tokens, media: Sequence[Medium], record: Record, processor: MediaProcessor
) -> list[tuple[int, int]]:
    """The tokens [start, end) that belong to each medium, those around its places included.

    Raises:
        DataError: The text holds other places than those of its media.
    """
    places = np.flatnonzero(processor.is_place(tokens.ids))
    counts = [medium.num_tokens for medium in media]
    if len(places) != sum(counts):
        raise refuse(
            record,
            f"the tokens have {len(places)} places for media, the media need {sum(counts)}",
            "look for the processor's own tokens in the text, and leave them out",
        )
    edges = np.cumsum([0, *counts])
    spans = pairwise(edges.tolist())
    return [_widen(tokens, int(places[a]), int(places[b - 1]) + 1, processor) for a, b in spans]


def _widen(tokens: Tokens, start: int, end: int, processor: MediaProcessor) -> tuple[int, int]:
    """Take in the tokens at either side that begin and end a medium, and its sound within."""
    before, behind = processor.edges
    while start and tokens.ids[start - 1] in before:
        start -= 1
    while end < len(tokens.ids) and tokens.ids[end] in behind:
        end += 1
    return start, end


def _check_tracks(media: Sequence[Medium], record: Record, processor: MediaProcessor) -> None:
    """See that all videos of a record have a sound, or none: models count places for one way."""
    if not processor.config.use_audio_in_video:
        return
    tracks = {has_track(medium) for medium in media if medium.kind == "video"}
    if len(tracks) > 1:
        raise refuse(
            record,
            "some of its videos have a sound and others none, which the model cannot tell apart",
            "give each video a sound, silence if need be, or make several records of it",
        )


def _by_kind(
    media: Sequence[Medium], record: Record, processor: MediaProcessor
) -> dict[str, Iterator[Medium]]:
    kinds = {medium.kind for medium in media}
    for kind in sorted(kinds - processor.tokens.keys()):
        known = ", ".join(processor.tokens) or "text only"
        raise refuse(
            record,
            f"the record has {kind}s, which the model does not take ({known})",
            "leave them out, or train a model that does",
        )
    return {kind: iter([m for m in media if m.kind == kind]) for kind in kinds}


def _find(text: str, processor: MediaProcessor) -> Iterator[tuple[str, tuple[int, int]]]:
    kinds = {token: kind for kind, token in processor.tokens.items()}
    for match in re.finditer("|".join(map(re.escape, kinds)), text):
        yield kinds[match[0]], match.span()


def _uneven(
    record: Record, text: str, media: Sequence[Medium], processor: MediaProcessor
) -> Exception:
    places = [kind for kind, _ in _find(text, processor)]
    shown = ", ".join(
        f"{places.count(kind)} places for {sum(m.kind == kind for m in media)} {kind}s"
        for kind in processor.tokens
    )
    return refuse(
        record,
        f"the chat template writes {shown}",
        f"keep {' and '.join(processor.tokens.values())} out of the words, and use the "
        "processor's own chat template",
    )


def show_places(sample: Sample, processor: MediaProcessor) -> Sample:
    """The sample with the first place of each medium alone, for people who read its text."""
    places = np.flatnonzero(processor.is_place(sample.input_ids))
    firsts = np.cumsum([0, *(medium.num_tokens for medium in sample.media)])[:-1]
    keeps = np.ones(len(sample), np.bool_)
    keeps[places] = False
    keeps[places[firsts[firsts < len(places)]]] = True
    weights = None if sample.weights is None else sample.weights[keeps]
    ids, labels = sample.input_ids[keeps], sample.labels[keeps]
    return replace(sample, input_ids=ids, labels=labels, weights=weights)
