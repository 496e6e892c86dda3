"""Where tokens stand in a text, from how many bytes each token of a vocabulary stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

BYTE_LEVEL = "ByteLevel"


def token_sizes(backend: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Bytes that each token stands for, by its id; None where that cannot be said of a token.

    It can where every text is the tokens' bytes one after another: byte-level BPE, which writes
    each byte as one character, without a normalizer and without a space put in front.

    Args:
        backend: The Rust part of a tokenizer.
    """
    parts = json.loads(backend.to_str())
    if parts["normalizer"] is not None or parts["model"]["type"] != "BPE":
        return None
    kinds = _kinds(parts["pre_tokenizer"], "pretokenizers")
    levels = [kind for kind in kinds if kind["type"] == BYTE_LEVEL]
    if len(levels) != 1 or levels[0].get("add_prefix_space"):
        return None
    if any(kind["type"] not in (BYTE_LEVEL, "Split", "Digits") for kind in kinds):
        return None
    if any(kind.get("behavior") == "Removed" for kind in kinds):
        return None
    sizes = np.zeros(backend.get_vocab_size(with_added_tokens=True) + 1, np.int64)
    added = {token["id"]: token["content"] for token in parts["added_tokens"]}
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= len(sizes):
            return None
        sizes[index] = len(added[index].encode()) if index in added else len(token)
    return sizes


def _kinds(part: dict[str, object] | None, key: str) -> list[dict[str, object]]:
    """A part of a tokenizer, or the parts of a sequence of them."""
    if part is None:
        return []
    inner = part.get(key)
    return inner if isinstance(inner, list) else [part]


def tokens_at(
    ids: npt.NDArray[np.int32], sizes: npt.NDArray[np.int64], text: str, places: Sequence[int]
) -> list[int] | None:
    """The token that begins at each of some characters, or their number for the end of the text.

    Args:
        ids: Tokens of the text.
        sizes: From `token_sizes`.
        text: What was tokenised.
        places: Characters of it.

    Returns:
        None where a token lies across one of the places, or where the tokens are not all of the
        text's bytes, as with an added token that takes white space with it.
    """
    ends = np.cumsum(sizes[ids])
    if text.isascii():
        total, wanted = len(text), np.asarray(places, np.int64)
    else:
        total = len(text.encode())
        wanted = np.asarray([len(text[:place].encode()) for place in places], np.int64)
    if not len(ids) or ends[-1] != total:
        return None
    begins = np.append(ends - sizes[ids], total)
    found = np.searchsorted(begins, wanted)
    return found.tolist() if np.array_equal(begins[found], wanted) else None
