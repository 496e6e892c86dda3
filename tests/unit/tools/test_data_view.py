import io

import numpy as np
import pytest
from rich.console import Console

from omnilit.tools.data_view import (
    Piece,
    describe_sample,
    escape_controls,
    render,
    show_samples,
    spread,
    token_weights,
)
from omnilit.types import IGNORE, Origin, Sample
from tests.helpers.tokenizers import build_metaspace_tokenizer, build_tokenizer

ORIGIN = Origin("docs", "a.jsonl", 7)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def make(tokenizer, *stretches, **more):
    """A sample of (text, weight) stretches."""
    ids, weights = [], []
    for text, weight in stretches:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        weights += [weight] * len(piece)
    ids, weights = np.asarray(ids, np.int32), np.asarray(weights, np.float32)
    labels = np.where(weights > 0, ids, np.int32(IGNORE))
    has_weights = bool(set(weights.tolist()) - {0.0, 1.0})
    return Sample(ids, labels, ORIGIN, weights=weights if has_weights else None, **more)


def shown(sample, tokenizer, *, is_terminal=False):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=is_terminal, color_system="truecolor" if is_terminal else None,
        width=40, legacy_windows=False,
    )  # fmt: skip
    show_samples([describe_sample(1, sample, tokenizer)], console)
    return out.getvalue()


def test_trained_text_stands_in_brackets_without_a_terminal(tokenizer):
    sample = make(tokenizer, ("<|im_start|>a\nhi ", 0), ("you[/red]<|im_end|>", 1), ("\n", 0))
    text = shown(sample, tokenizer)
    assert "\n<|im_start|>a\nhi [[you[/red]<|im_end|>]]\n" in text
    assert "\x1b" not in text


def test_trained_text_is_green_in_a_terminal(tokenizer):
    text = shown(make(tokenizer, ("hi ", 0), ("you", 1)), tokenizer, is_terminal=True)
    assert "on green" in text
    assert "\x1b[2mhi \x1b[0m\x1b[1;30;42myou\x1b[0m\n" in text
    assert "[[" not in text


def test_the_heading_names_origin_and_counts(tokenizer):
    sample = make(tokenizer, ("hi ", 0), ("\n\n", 1))
    described = describe_sample(1234, sample, tokenizer)
    assert described.heading == (
        f"sample 1,234: docs, a.jsonl:7; {len(sample)} tokens, {described.num_targets} supervised"
    )
    assert described.num_targets == (sample.labels != IGNORE).sum() > 0


def test_other_weights_stand_behind_the_text(tokenizer):
    sample = make(tokenizer, ("ask ", 0), ("one", 0.5), ("two", 2), (" ", 0), ("x", 1))
    assert "ask [[one]]{0.5}[[two]]{2} [[x]]\n" in shown(sample, tokenizer)


def test_both_answers_of_a_pair_are_shown_apart(tokenizer):
    sample = make(
        tokenizer, ("ask ", 0), ("yes", 1), ("ask ", 0), ("no", 1),
        pair_start=len(tokenizer.encode("ask ")) + len(tokenizer.encode("yes")),
    )  # fmt: skip
    text = shown(sample, tokenizer)
    assert "--- chosen ---\nask [[yes]]\n--- rejected ---\nask [[no]]\n" in text


def test_a_class_stands_in_the_heading(tokenizer):
    ids = np.asarray(tokenizer.encode("a fox"), np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[-1] = 3
    described = describe_sample(1, Sample(ids, labels, ORIGIN), tokenizer, has_class=True)
    assert described.heading.endswith("tokens, class 3")


def test_the_first_token_of_a_sequence_counts_nothing():
    ids = np.arange(6, dtype=np.int32)
    assert token_weights(Sample(ids, ids, ORIGIN)).tolist() == [0, 1, 1, 1, 1, 1]
    pair = Sample(ids, ids, ORIGIN, pair_start=3)
    assert token_weights(pair).tolist() == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("build", [build_tokenizer, build_metaspace_tokenizer])
def test_the_pieces_together_are_the_decoded_sample(build):
    tokenizer = build()
    rng = np.random.default_rng(0)
    text = "the quick brown fox<|im_end|> jumps over the lazy dog"
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
    whole = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    pieces = ()
    for _ in range(20):
        labels = np.where(rng.random(len(ids)) < 0.5, ids, np.int32(IGNORE))
        ((_, pieces),) = describe_sample(1, Sample(ids, labels, ORIGIN), tokenizer).parts
        assert "".join(piece.text for piece in pieces) == whole
    assert any(piece.is_special and piece.text == "<|im_end|>" for piece in pieces)


def test_an_edge_within_a_characters_bytes_is_no_error(tokenizer):
    ids = np.asarray(tokenizer.encode("\u20ac\u20ac"), np.int32)
    labels = np.where(np.arange(len(ids)) % 2, ids, np.int32(IGNORE))
    ((_, pieces),) = describe_sample(1, Sample(ids, labels, ORIGIN), tokenizer).parts
    assert len(pieces) == len(ids)


def test_control_characters_cannot_steer_the_terminal():
    assert escape_controls("a\tb\n\x1b[2J\x7f\x9b") == "a\tb\n\\x1b[2J\\x7f\\x9b"
    text = render([Piece("\x1b[2J", 1.0, is_special=False)], has_colour=False)
    assert text.plain == "[[\\x1b[2J]]"


@pytest.mark.parametrize(
    ("num_shown", "num_samples", "expected"),
    [
        (3, 9, [0, 3, 6]),
        (1, 9, [0]),
        (5, 3, [0, 1, 2]),
        (0, 9, []),
        (4, 0, []),
        (2, 1001, [0, 500]),
    ],
)
def test_samples_are_spread_over_the_data(num_shown, num_samples, expected):
    assert spread(num_shown, num_samples) == expected


def test_nothing_to_show_prints_nothing():
    out = io.StringIO()
    show_samples([], Console(file=out))
    assert out.getvalue() == ""
