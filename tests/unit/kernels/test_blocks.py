"""Attention to keys that come in parts is attention to all of them, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from omnilit.kernels.attention import AttentionRule, eager
from omnilit.kernels.blocks import Block, JoinedAttention, JoinedGradients, pair_blocks

BOUNDS = (0, 3, 4, 15, 15, 24)
RULES = {
    "causal": AttentionRule(),
    "scaled": AttentionRule(scale=0.3),
    "window": AttentionRule(window=4),
    "window of one": AttentionRule(window=1),
    "wide window": AttentionRule(window=1000),
    "capped": AttentionRule(softcap=1.5),
    "both ways": AttentionRule(is_causal=False),
    "both ways in a window": AttentionRule(is_causal=False, window=3),
    "capped in a window": AttentionRule(softcap=1.5, window=5),
}
MINE = [(4, 8), (16, 20)]
PARTS = [MINE, [(0, 4), (20, 24)], [(8, 12), (12, 16)]]
INDEX = torch.cat([torch.arange(*span) for span in MINE])


def qkv() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((4, 24, 8), (2, 24, 8), (2, 24, 6))
    return [torch.randn(2, *shape, generator=make).requires_grad_() for shape in shapes]


def pick(x: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([x[:, :, start:end] for start, end in spans], dim=2)


def visible(rule: AttentionRule) -> torch.Tensor:
    """[T, L] of the row, by the definition."""
    is_seen = torch.zeros(24, 24, dtype=torch.bool)
    for a, b in pairwise(BOUNDS):
        is_seen[a:b, a:b] = True
    distance = torch.arange(24)[:, None] - torch.arange(24)
    if rule.is_causal:
        is_seen &= distance >= 0
    return is_seen if rule.window is None else is_seen & (distance.abs() < rule.window)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("key_spans", PARTS, ids=str)
def test_blocks_are_the_pairs_that_see_each_other(key_spans, rule):
    found = torch.zeros(8, 8, dtype=torch.int64)
    for block in pair_blocks(MINE, key_spans, BOUNDS, rule):
        hidden = block.is_hidden(rule, torch.device("cpu"))
        seen = found[slice(*block.queries), slice(*block.keys)]
        seen += 1 if hidden is None else ~hidden
    columns = torch.cat([torch.arange(*span) for span in key_spans])
    assert torch.equal(found, visible(rule)[INDEX][:, columns].long())


def test_blocks_leave_out_what_is_hidden():
    blocks = list(pair_blocks([(0, 24)], [(0, 24)], BOUNDS, AttentionRule()))
    sizes = [(3, 3), (1, 1), (11, 11), (9, 9)]
    assert [(b.queries[1] - b.queries[0], b.keys[1] - b.keys[0]) for b in blocks] == sizes
    assert not list(pair_blocks([(0, 12)], [(12, 24)], BOUNDS, AttentionRule()))[1:]
    (block,) = pair_blocks([(16, 24)], [(0, 16)], BOUNDS, AttentionRule())
    assert block == Block((0, 8), (15, 16), 1)
    assert block.is_hidden(AttentionRule(), torch.device("cpu")) is None


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_parts_join_to_the_whole(rule, order, has_sinks):
    q, k, v = qkv()
    sinks = torch.linspace(-1, 1, 4).requires_grad_() if has_sinks else None
    expected = eager(q, k, v, bounds=BOUNDS, rule=rule, sinks_N=sinks)[:, INDEX].transpose(1, 2)
    joined = JoinedAttention(pick(q, MINE), 6, rule, sinks)
    for number in order:
        part = PARTS[number]
        for block in pair_blocks(MINE, part, BOUNDS, rule):
            joined.add(pick(k, part), pick(v, part), block)
    out, norms = joined.finish()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = JoinedGradients(pick(q, MINE), out, norms, given, rule)
    sums = (torch.zeros(2, 2, 24, 8), torch.zeros(2, 2, 24, 6))
    for number in order:
        part = PARTS[number]
        kv, grads = (pick(k, part), pick(v, part)), [pick(x, part) for x in sums]
        for block in pair_blocks(MINE, part, BOUNDS, rule):
            gradients.add(kv, (grads[0], grads[1]), block)
        index = torch.cat([torch.arange(*span) for span in part])
        for total, grad in zip(sums, grads, strict=True):
            total[:, :, index] += grad
    grad_q, grad_sinks = gradients.finish(sinks)
    wanted = [q, k, v, *([] if sinks is None else [sinks])]
    ours = [grad_q, *sums, *([] if grad_sinks is None else [grad_sinks])]
    theirs = list(torch.autograd.grad((expected * given).sum(), wanted))
    theirs[0] = pick(theirs[0], MINE)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_queries_that_see_nothing_of_a_part_stay_as_they_were():
    q, k, v = (x.detach() for x in qkv())
    rule = AttentionRule(window=2)
    joined = JoinedAttention(q[:, :, :4], 6, rule, None)
    joined.add(k, v, Block((0, 4), (4, 8), 5))  # too far, before anything else was seen
    out, norms = joined.finish()
    assert not out.any()
    assert norms.isneginf().all()
    joined.add(k, v, Block((0, 4), (0, 4), 0))
    again, _ = joined.finish()
    torch.testing.assert_close(
        again.transpose(1, 2),
        eager(q[:, :, :4], k[:, :, :4], v[:, :, :4], bounds=(0, 4), rule=rule),
    )


def test_bfloat16_stays_near_float32():
    q, k, v = (x.detach().bfloat16() for x in qkv())
    exact = eager(q.float(), k.float(), v.float(), bounds=BOUNDS, rule=AttentionRule())
    joined = JoinedAttention(q, 6, AttentionRule(), None)
    for part in PARTS:
        for block in pair_blocks([(0, 24)], part, BOUNDS, AttentionRule()):
            joined.add(pick(k, part), pick(v, part), block)
    out, _ = joined.finish()
    assert out.dtype == torch.bfloat16
    error = (out.transpose(1, 2).float() - exact).norm() / exact.norm()
    assert error < 3 / 256  # a few roundings to 8 bits
