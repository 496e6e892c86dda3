"""Places of tokens by the bytes that they stand for, beside the tokenizer's own offsets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from omnilit.data.encode import Encoder, encode_rendered
from omnilit.data.templates import Rendered
from omnilit.data.token_bytes import token_sizes, tokens_at
from omnilit.types import Origin, Record
from tests.helpers.tokenizers import build_tokenizer

ENCODER = Encoder.of(build_tokenizer())
RECORD = Record({}, Origin("train", "f", 1))
PIECES = st.sampled_from(
    ["a cat ", "<|im_start|>", "<|im_end|>", "\n", "caf\u00e9 \u4f60", "\U0001f600", " 12 ", ""]
)


@given(st.lists(PIECES, min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_marks_are_those_of_the_tokenizers_own_offsets(pieces, data):
    text = "".join(pieces) or "x"
    start = data.draw(st.integers(0, len(text) - 1))
    rendered = Rendered(text, [(start, data.draw(st.integers(start + 1, len(text))))], [0.5])
    assert ENCODER.sizes is not None
    (ours,) = encode_rendered(ENCODER, [rendered], [RECORD])
    (theirs,) = encode_rendered(replace(ENCODER, sizes=None), [rendered], [RECORD])
    assert np.array_equal(ours.ids, theirs.ids)
    assert np.array_equal(ours.is_label, theirs.is_label)


def test_sizes_are_the_bytes_of_the_tokens():
    sizes = token_sizes(ENCODER.backend)
    assert sizes is not None
    for text in ("the quick <|im_end|>", "\u4f60\u597d \U0001f600"):
        ids = np.asarray(ENCODER.backend.encode(text).ids, np.int32)
        assert sizes[ids].sum() == len(text.encode())
        assert tokens_at(ids, sizes, text, [0, len(text)]) == [0, len(ids)]


def test_a_token_that_takes_white_space_with_it_is_noticed():
    backend = Tokenizer.from_str(ENCODER.backend.to_str())
    backend.add_tokens([AddedToken("<tool>", lstrip=True)])
    sizes = token_sizes(backend)
    assert sizes is not None
    text = "a cat   <tool> b"
    ids = np.asarray(backend.encode(text).ids, np.int32)
    assert tokens_at(ids, sizes, text, [0]) is None


def test_an_edge_inside_a_token_is_noticed():
    sizes = token_sizes(ENCODER.backend)
    assert sizes is not None
    ids = np.asarray(ENCODER.backend.encode("<|im_end|>").ids, np.int32)
    assert tokens_at(ids, sizes, "<|im_end|>", [3]) is None


def changed(name: str, part: object) -> Tokenizer:
    backend = Tokenizer.from_str(ENCODER.backend.to_str())
    setattr(backend, name, part)
    return backend


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("normalizer", normalizers.NFC()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", None),
        (
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(" ", "removed"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
        ),
    ],
)
def test_tokenizers_whose_tokens_are_not_the_texts_bytes_are_known(name, part):
    assert token_sizes(changed(name, part)) is None
