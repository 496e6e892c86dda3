"""Tokens of a rendered conversation, each with whether it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from omnilit.data.labels import label_spans
from omnilit.data.messages import refuse
from omnilit.data.templates import Rendered, mask_error
from omnilit.data.token_bytes import token_sizes, tokens_at
from omnilit.errors import ConfigError
from omnilit.types import IGNORE, Record, Sample

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """A tokenised text.

    Args:
        ids: int32 [T].
        is_label: True where the token is trained; bool [T].
        weights: How much each label counts, float32 [T]; None where all count 1.
    """

    ids: npt.NDArray[np.int32]
    is_label: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float32] | None = None


class Extents(NamedTuple):
    """The characters of a text that each token stands for: [begin, end), both int64 [T]."""

    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A copy of the Rust part of a tokenizer, whose offsets are exact.

    Args:
        backend: Without the post-processor, which may trim white space off the offsets, and
            without truncation.
        sizes: Bytes of each token, where tokens are nothing but bytes; see `token_sizes`.
    """

    backend: Tokenizer
    sizes: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Copy the tokenizer's Rust part; leaves the tokenizer as it is.

        Raises:
            ConfigError: The tokenizer is written in Python and has none.
        """
        backend = Tokenizer.from_str(get_backend(tokenizer).to_str())
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, token_sizes(backend))

    def decode(self, ids: npt.NDArray[np.int32]) -> str:
        """The text of `ids`, special tokens included and white space as it is."""
        return self.backend.decode(ids.tolist(), skip_special_tokens=False)


def get_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust part of a tokenizer, which knows the characters that each token stands for.

    Raises:
        ConfigError: The tokenizer is written in Python and has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            key="model.tokenizer_path",
            problem=f"{type(tokenizer).__name__} does not know which characters a token covers",
            fix="use a tokenizer with a tokenizer.json",
        )
    return backend


def encode_ids(encoder: Encoder, texts: list[str]) -> list[npt.NDArray[np.int32]]:
    """Tokenise a batch of texts without special tokens of the tokenizer's own."""
    encodings = encoder.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


def encode_texts(encoder: Encoder, texts: list[str]) -> list[tuple[npt.NDArray[np.int32], Extents]]:
    """As `encode_ids`, with the characters of each token."""
    encodings = encoder.backend.encode_batch(texts, add_special_tokens=False)
    return [(np.asarray(found.ids, dtype=np.int32), _extents(found)) for found in encodings]


def encode_rendered(
    encoder: Encoder, rendered: Sequence[Rendered], records: Sequence[Record]
) -> list[Tokens]:
    """Tokenise rendered conversations and mark the trained tokens.

    The ids are those of the whole text, as plain transformers tokenises it, unless a token
    lies across the edge of a trained span, such as a space before the first word. Then the
    text is cut at that edge: a prompt at inference ends there, too. Where a cut would change
    the text (tokenizers that put a space before every text), a token that reaches out of a
    span by white space alone is trained.

    Raises:
        DataError: A token holds both header and words, and the text cannot be cut there.
    """
    if encoder.sizes is None:
        return _encode_with_offsets(encoder, rendered, records)
    found = [
        _mark_by_sizes(ids, encoder.sizes, one)
        for ids, one in zip(
            encode_ids(encoder, [one.text for one in rendered]), rendered, strict=True
        )
    ]
    odd = [index for index, tokens in enumerate(found) if tokens is None]
    again = _encode_with_offsets(encoder, [rendered[i] for i in odd], [records[i] for i in odd])
    by_index = dict(zip(odd, again, strict=True))
    return [by_index[i] if tokens is None else tokens for i, tokens in enumerate(found)]


def _encode_with_offsets(
    encoder: Encoder, rendered: Sequence[Rendered], records: Sequence[Record]
) -> list[Tokens]:
    """As `encode_rendered`, by the tokenizer's own offsets, which cost half as much again."""
    texts = [one.text for one in rendered]
    encodings = encoder.backend.encode_batch(texts, add_special_tokens=False)
    tokens: list[Tokens] = []
    for encoding, one, record in zip(encodings, rendered, records, strict=True):
        found = _mark_by_edges(encoding, one)
        if found is None:
            found = _mark_by_extents(encoder, encoding, one, record)
        tokens.append(found)
    return tokens


def find_tokens(
    encoder: Encoder, rendered: Rendered, tokens: Tokens, places: Sequence[int]
) -> list[int]:
    """The token that begins at each of some characters of a text; -1 where none does.

    Args:
        encoder: Tokenises.
        rendered: The text.
        tokens: What `encode_rendered` made of it.
        places: Characters of the text.
    """
    whole = (0, len(rendered.text))
    edges = sorted({*whole, *(edge for span in rendered.spans for edge in span)})
    for cuts in (whole, edges):
        pairs = list(pairwise(cuts))
        pieces = encode_texts(encoder, [rendered.text[a:b] for a, b in pairs])
        if np.array_equal(np.concatenate([ids for ids, _ in pieces]), tokens.ids):
            shifted = zip(pieces, pairs, strict=True)
            begin = np.concatenate([extents.begin + a for (_, extents), (a, _) in shifted])
            first = {char: index for index, char in reversed(list(enumerate(begin.tolist())))}
            return [first.get(place, -1) for place in places]
    return [-1] * len(places)


def _mark_by_sizes(
    ids: npt.NDArray[np.int32], sizes: npt.NDArray[np.int64], rendered: Rendered
) -> Tokens | None:
    """Find the edges of the spans among the bytes of the tokens; None where that cannot be."""
    edges = [edge for span in rendered.spans for edge in span]
    found = tokens_at(ids, sizes, rendered.text, edges)
    return None if found is None else _mark(ids, found, rendered)


def _mark_by_edges(encoding: Encoding, rendered: Rendered) -> Tokens | None:
    """Ask for the tokens at the edges of the spans only; None where an edge is inside a token."""
    ids = np.asarray(encoding.ids, dtype=np.int32)
    found: list[int] = []
    for edge in (edge for span in rendered.spans for edge in span):
        token = len(ids) if edge == len(rendered.text) else _token_at(encoding, edge)
        if token is None:
            return None
        found.append(token)
    return _mark(ids, found, rendered)


def _mark(ids: npt.NDArray[np.int32], edges: list[int], rendered: Rendered) -> Tokens:
    """Tokens with what lies between pairs of edges trained."""
    is_label = np.zeros(len(ids), dtype=np.bool_)
    weights = None
    if any(weight != 1 for weight in rendered.weights):
        weights = np.ones(len(ids), np.float32)
    pairs = zip(edges[::2], edges[1::2], rendered.weights, strict=True)
    for first, last, weight in pairs:
        is_label[first:last] = True
        if weights is not None:
            weights[first:last] = weight
    return Tokens(ids, is_label, weights)


def _token_at(encoding: Encoding, char: int) -> int | None:
    """The first token of the character at `char`, where a token begins there."""
    index = encoding.char_to_token(char)
    if index is None:
        return None
    extent = encoding.token_to_chars(index)
    return index if extent is not None and extent[0] == char else None


def _mark_by_extents(
    encoder: Encoder, encoding: Encoding, rendered: Rendered, record: Record
) -> Tokens:
    ids, extents = np.asarray(encoding.ids, dtype=np.int32), _extents(encoding)
    edges = sorted(edge for span in rendered.spans for edge in span)
    whole = Tokens(ids, _inside(extents, rendered), _weigh(extents, rendered))
    if _crossing(extents, edges).any():
        return _encode_cut(encoder, rendered, whole, record)
    return whole


def _extents(encoding: Encoding) -> Extents:
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    end = np.maximum.accumulate(offsets[:, 1])
    # Bytes of one character share its offsets; what a normalizer drops leaves a gap, which
    # goes to the token behind it.
    begin = np.minimum(offsets[:, 0], np.concatenate([[0], end[:-1]])[: len(end)])
    return Extents(begin, end)


def _weigh(extents: Extents, rendered: Rendered) -> npt.NDArray[np.float32] | None:
    if all(weight == 1 for weight in rendered.weights):
        return None
    weights = np.ones(len(extents.begin), np.float32)
    for (start, end), weight in zip(rendered.spans, rendered.weights, strict=True):
        weights[(extents.end > start) & (extents.begin < end)] = weight
    return weights


def to_sample(tokens: Tokens, record: Record) -> Sample:
    """The sample of a tokenised record: its labels are its ids where they are trained."""
    labels = np.where(tokens.is_label, tokens.ids, np.int32(IGNORE))
    return Sample(tokens.ids, labels, record.origin, tokens.weights)


def decode_spans(sample: Sample, encoder: Encoder) -> list[tuple[str, bool]]:
    """A sample as text, in pieces, each with whether it is trained; what is shown at start."""
    edges = sorted({0, len(sample), *(e for span in label_spans(sample.labels) for e in span)})
    return [
        (encoder.decode(sample.input_ids[a:b]), bool(sample.labels[a] != IGNORE))
        for a, b in pairwise(edges)
    ]


def check_mask(tokens: Tokens, rendered: Rendered, record: Record, encoder: Encoder) -> None:
    """See that the trained tokens, decoded, read as the trained text; white space aside.

    Raises:
        DataError: They do not; shows both.
    """
    read = encoder.decode(tokens.ids[tokens.is_label])
    said = "".join(rendered.text[start:end] for start, end in rendered.spans)
    normalizer = encoder.backend.normalizer
    if normalizer is not None:
        said = normalizer.normalize_str(said).replace("\u2581", " ")
    if "".join(read.split()) != "".join(said.split()):
        raise mask_error(record, said, read)


def _inside(extents: Extents, rendered: Rendered) -> npt.NDArray[np.bool_]:
    is_label = np.zeros(len(extents.begin), dtype=np.bool_)
    for start, end in rendered.spans:
        is_label |= (extents.begin >= start) & (extents.end <= end) & (extents.end > start)
    return is_label


def _crossing(extents: Extents, edges: Sequence[int]) -> npt.NDArray[np.bool_]:
    crossing = np.zeros(len(extents.begin), dtype=np.bool_)
    for edge in edges:
        crossing |= (extents.begin < edge) & (edge < extents.end)
    return crossing


def _encode_cut(encoder: Encoder, rendered: Rendered, whole: Tokens, record: Record) -> Tokens:
    text = rendered.text
    edges = sorted({0, len(text), *(edge for span in rendered.spans for edge in span)})
    pieces = encode_texts(encoder, [text[a:b] for a, b in pairwise(edges)])
    ids = np.concatenate([piece for piece, _ in pieces])
    if encoder.decode(ids) != encoder.decode(whole.ids):
        return _widen(encoder, rendered, whole, record)
    starts = {start for start, _ in rendered.spans}
    is_label = [
        np.full(len(piece), a in starts)
        for (piece, _), (a, _) in zip(pieces, pairwise(edges), strict=True)
    ]
    weights = None
    if whole.weights is not None:
        of_start = {span[0]: w for span, w in zip(rendered.spans, rendered.weights, strict=True)}
        weights = np.concatenate(
            [
                np.full(len(piece), of_start.get(a, 1.0), np.float32)
                for (piece, _), (a, _) in zip(pieces, pairwise(edges), strict=True)
            ]
        )
    return Tokens(ids, np.concatenate(is_label), weights)


def _widen(encoder: Encoder, rendered: Rendered, whole: Tokens, record: Record) -> Tokens:
    """Take in the tokens that reach out of a span by white space alone."""
    ((_, extents),) = encode_texts(encoder, [rendered.text])
    is_label = whole.is_label.copy()
    for start, end in rendered.spans:
        for index in np.flatnonzero(_crossing(extents, (start, end))).tolist():
            a, b = int(extents.begin[index]), int(extents.end[index])
            outside = rendered.text[a : max(a, start)] + rendered.text[min(b, end) : b]
            if outside.strip():
                raise refuse(
                    record,
                    f"the token {rendered.text[a:b]!r} holds both trained and other text",
                    "use a chat template that sets them apart, or data.chat_template: plain",
                )
            is_label[index] = True
    return Tokens(whole.ids, is_label, whole.weights)
