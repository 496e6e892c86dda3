"""Masks against an oracle that knows characters only: no jinja, no offsets, no spans."""

from __future__ import annotations

import random
import sys

import pytest

from omnilit.data.encode import Encoder, decode_spans
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.types import Origin, Record
from tests.helpers.conversations import ORACLES, Oracle, Part, draw_record
from tests.helpers.thinking import REWRITERS, build_thinking_tokenizer

ALL = (*ORACLES, *REWRITERS)
NUM_CONVERSATIONS = 640  # of each of sixteen templates: 10,240
BATCH = 128


def merge(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one part, empty ones left out."""
    merged: list[Part] = []
    for text, is_trained in parts:
        if text and merged and merged[-1][1] == is_trained:
            merged[-1] = (merged[-1][0] + text, is_trained)
        elif text:
            merged.append((text, is_trained))
    return merged


@pytest.mark.parametrize(("name", "own", "oracle", "features"), ALL)
def test_the_trained_characters_are_those_of_the_oracle(
    name: str, own: str | None, oracle: Oracle, features: frozenset[str]
):
    tokenizer = build_thinking_tokenizer(own)
    encoder = Encoder.of(tokenizer)
    transform = build_transform(TransformSettings(chat_template=name, max_seq_len=9999), tokenizer)
    rng, num_tokens, differences = random.Random(name + str(own)), 0, []
    for start in range(0, NUM_CONVERSATIONS, BATCH):
        drawn = [draw_record(rng, features=features) for _ in range(BATCH)]
        records = [
            Record({"messages": messages, "tools": tools}, Origin("o", "f", start + i))
            for i, (messages, tools) in enumerate(drawn)
        ]
        samples = transform.encode(records).samples
        for (messages, tools), sample in zip(drawn, samples, strict=True):
            num_tokens += len(sample)
            found = decode_spans(sample, encoder)
            if merge(found) != merge(oracle(messages, tools)):
                differences.append((messages, found))
    assert not differences, (len(differences), differences[0])
    sys.stdout.write(
        f"mask oracle: {name}: {NUM_CONVERSATIONS} conversations, {num_tokens} tokens, "
        "0 differences\n"
    )


def test_the_oracle_sees_ten_thousand_conversations():
    assert NUM_CONVERSATIONS * len(ALL) >= 10_000
    assert NUM_CONVERSATIONS % BATCH == 0
