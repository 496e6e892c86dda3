from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from omnilit.kernels import attention as module
from omnilit.kernels.attention import SHORT, AttentionRule, eager, sdpa

KERNELS = (eager, sdpa)


def qkv(tokens, *, keys=None, heads=4, key_heads=2, value_dim=6, batch=1):
    make = torch.Generator().manual_seed(0)
    shapes = (
        (heads, tokens, 8),
        (key_heads, keys or tokens, 8),
        (key_heads, keys or tokens, value_dim),
    )
    return [torch.randn(batch, *shape, generator=make).requires_grad_() for shape in shapes]


RULES = {
    "causal": AttentionRule(),
    "scaled": AttentionRule(scale=0.3),
    "window": AttentionRule(window=3),
    "wide window": AttentionRule(window=1000),
    "capped": AttentionRule(softcap=1.5),
    "both ways": AttentionRule(is_causal=False),
    "both ways in a window": AttentionRule(is_causal=False, window=2),
}


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("bounds", [(0, 1), (0, 13), (0, 4, 5, 13)])
def test_sdpa_equals_eager_in_values_and_gradients(bounds, rule, has_sinks):
    inputs = qkv(bounds[-1])
    sinks = torch.linspace(-1, 1, 4).requires_grad_() if has_sinks else None
    wanted = [*inputs, *([sinks] if sinks is not None else [])]
    found = []
    for kernel in KERNELS:
        out = kernel(*inputs, bounds=bounds, rule=rule, sinks_N=sinks)
        found.append((out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_segment_sees_nothing_of_the_others(kernel):
    q, k, v = qkv(9)
    bounds, rule = (0, 4, 9), AttentionRule()
    packed = kernel(q, k, v, bounds=bounds, rule=rule)
    alone = kernel(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], bounds=(0, 5), rule=rule)
    torch.testing.assert_close(packed[:, 4:], alone)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_scores_give_the_mean_of_what_is_visible(kernel):
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    run = {name: kernel(q, k, v, bounds=(0, 4), rule=rule).flatten().tolist()
           for name, rule in RULES.items()}  # fmt: skip
    assert run["causal"] == pytest.approx([1, 1.5, 7 / 3, 15 / 4])
    assert run["window"] == pytest.approx([1, 1.5, 7 / 3, 14 / 3])
    assert run["both ways in a window"] == pytest.approx([1.5, 7 / 3, 14 / 3, 6])
    assert run["both ways"] == pytest.approx([15 / 4] * 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sink_takes_its_share_of_the_weight(kernel):
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 1)
    sinks = torch.tensor([math.log(3.0)])
    out = kernel(q, k, v, bounds=(0, 1), rule=AttentionRule(), sinks_N=sinks)
    assert out.item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("rule", [RULES["causal"], RULES["window"], RULES["capped"]])
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_a_cache_the_queries_are_the_last_tokens(kernel, rule):
    q, k, v = qkv(7, batch=2)
    whole = kernel(q, k, v, bounds=(0, 7), rule=rule)
    last = kernel(q[:, :, 5:], k, v, bounds=(0, 2), rule=rule)
    torch.testing.assert_close(last, whole[:, 5:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_and_keeps_the_mean(kernel):
    q, k, v = (torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 400, 2), torch.ones(1, 1, 400, 1))
    rule = AttentionRule(dropout=0.5, is_causal=False)
    out = kernel(q, k, v, bounds=(0, 400), rule=rule)
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert out.std().item() > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_stays_near_float32(kernel):
    inputs = [x.detach() for x in qkv(123)]
    exact = eager(*inputs, bounds=(0, 60, 123), rule=AttentionRule())
    low = kernel(*(x.bfloat16() for x in inputs), bounds=(0, 60, 123), rule=AttentionRule())
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() / exact.norm() < 2 / 256  # bfloat16 has 8 bits


@pytest.mark.parametrize("tokens", [40, SHORT + 1])
def test_sdpa_in_bfloat16_is_as_near_to_float32_as_rounding_allows(tokens):
    inputs = qkv(tokens)
    narrow = [x.detach().bfloat16().requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in narrow]
    found = []
    for given in (narrow, exact):
        out = sdpa(*given, bounds=(0, 3, tokens), rule=AttentionRule())
        found.append((out, *torch.autograd.grad(out.float().square().sum(), given)))
    for ours, reference in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.float() - reference).norm() / reference.norm()
        assert error < 3 / 256  # of a few roundings to 8 bits


def test_short_segments_are_computed_in_float32_on_a_cpu(monkeypatch):
    seen = []

    def watch(q, *args, **kwargs):
        seen.append((q.shape[2], q.dtype))
        return scaled_dot_product_attention(q, *args, **kwargs)

    monkeypatch.setattr(module, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(module, "SHORT", 4)
    q, k, v = (x.bfloat16() for x in qkv(9))
    sdpa(q, k, v, bounds=(0, 4, 9), rule=AttentionRule())
    assert seen == [(4, torch.float32), (5, torch.bfloat16)]
