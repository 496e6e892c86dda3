"""A stretch of a row attends to the row's keys as the whole row does."""

from __future__ import annotations

import pytest
import torch

from omnilit.kernels.attention import AttentionRule, eager, sdpa
from omnilit.kernels.pieces import Piece, attend_spans, cut

BOUNDS = (0, 3, 4, 15, 15, 24)
RULES = {
    "causal": AttentionRule(),
    "window": AttentionRule(window=4),
    "window of one": AttentionRule(window=1),
    "capped": AttentionRule(softcap=1.5),
    "both ways": AttentionRule(is_causal=False),
    "both ways in a window": AttentionRule(is_causal=False, window=3),
}
SPANS = {
    "whole": [(0, 24)],
    "halves": [(0, 12), (12, 24)],
    "inside": [(5, 9), (16, 17)],
    "zigzag": [(6, 12), (12, 18)],
    "ends": [(0, 6), (18, 24)],
}


def qkv() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((4, 24, 8), (2, 24, 8), (2, 24, 6))
    return [torch.randn(1, *shape, generator=make).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("kernel", [eager, sdpa])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_stretches_are_rows_of_the_whole(rule, spans, kernel, has_sinks):
    sinks = torch.linspace(-1, 1, 4).requires_grad_() if has_sinks else None
    index = torch.cat([torch.arange(*span) for span in spans])
    whole, parts = qkv(), qkv()
    expected = eager(*whole, bounds=BOUNDS, rule=rule, sinks_N=sinks)[:, index]
    q, k, v = parts
    found = attend_spans(
        kernel, q[:, :, index], k, v, spans=spans, bounds=BOUNDS, rule=rule, sinks_N=sinks
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    more = [] if sinks is None else [sinks]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), [*parts, *more]),
        torch.autograd.grad(expected.square().sum(), [*whole, *more]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("span", "rule", "pieces"),
    [
        ((0, 24), "causal", [((0, 24), (0, 24), (0, 3, 4, 15, 24))]),
        ((6, 18), "causal", [((6, 15), (4, 15), (0, 9)), ((15, 18), (15, 18), (0, 3))]),
        ((6, 18), "window", [((6, 15), (4, 15), (0, 9)), ((15, 18), (15, 18), (0, 3))]),
        ((8, 15), "window", [((8, 15), (5, 15), (0, 7))]),
        ((1, 5), "both ways", [((1, 3), (0, 3), (0, 2)), ((3, 4), (3, 4), (0, 1)),
                               ((4, 5), (4, 15), (0, 1))]),
    ],
)  # fmt: skip
def test_only_a_segment_that_crosses_the_end_of_a_stretch_is_a_call_of_its_own(span, rule, pieces):
    assert list(cut(span, BOUNDS, RULES[rule])) == [Piece(*piece) for piece in pieces]
