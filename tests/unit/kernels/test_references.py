"""The eager references of the slots beside transformers' own code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from omnilit.kernels import load_balancing, moe, rms_norm, rope, swiglu
from tests.helpers.models import tiny


def test_rms_norm_scales_to_unit_mean_square():
    x = torch.tensor([[3.0, -4.0]])
    expected = x / (12.5 + 0.5) ** 0.5
    weight = torch.tensor([2.0, 1.0])
    torch.testing.assert_close(rms_norm.eager(x, weight, eps=0.5), expected * weight)
    torch.testing.assert_close(
        rms_norm.eager(x, weight, eps=0.5, offset=1.0), expected * (weight + 1)
    )


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma3", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_families(family, offset, dtype):
    norm = tiny(family).model.norm.to(dtype)
    x = torch.randn(3, 64).to(dtype)
    eps = getattr(norm, "variance_epsilon", 0.0) or norm.eps
    assert torch.equal(rms_norm.eager(x, norm.weight, eps=eps, offset=offset), norm(x))


@pytest.mark.parametrize("shape", [(1, 6), (123, 8), (2, 5, 3, 16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
# a bfloat16 value has 8 bits: two roundings of it are 2^-7 apart, relative to the largest
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_lean_rms_norm_equals_the_reference(shape, offset, dtype, bound):
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype).requires_grad_()
    along = torch.randn(shape).to(dtype)
    found = []
    for norm in (rms_norm.eager, rms_norm.lean):
        out = norm(x, weight, eps=1e-6, offset=offset)
        found.append((out, *torch.autograd.grad(out, (x, weight), along)))
    for ours, reference in zip(found[1], found[0], strict=True):
        assert ours.dtype == reference.dtype
        assert (ours - reference).abs().max() <= bound * reference.abs().max()


def test_lean_rms_norm_checks_out_by_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 1.0):
        torch.autograd.gradcheck(
            lambda x, w, offset=offset: rms_norm.lean(x, w, eps=1e-3, offset=offset),
            (x, weight),
            eps=1e-2,  # the statistics are in float32
            atol=1e-3,
        )


def test_swiglu_gates():
    gate, up = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])
    torch.testing.assert_close(
        swiglu.eager(gate, up), torch.tensor([0.0, 8 / (1 + 2.718281828**-2)])
    )


def test_rotary_equals_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, angles = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 5, 4)
    cos, sin = angles.repeat(1, 1, 2).cos(), angles.repeat(1, 1, 2).sin()
    for ours, theirs in zip(
        rope.eager(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rope.eager(q, k, cos, sin)[0].norm(), q.norm())


def test_experts_equal_the_models_own():
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts
    hidden, weights = torch.randn(9, 64), torch.rand(9, 2)
    index = torch.randint(0, 7, (9, 2))  # expert 7 stays empty
    ours = moe.eager(experts, hidden, index, weights)
    torch.testing.assert_close(ours, experts(hidden, index, weights))


def test_experts_skip_ids_past_the_last_one():
    experts: Any = SimpleNamespace(
        gate_up_proj=torch.randn(2, 4, 3), down_proj=torch.randn(2, 3, 2), act_fn=silu
    )
    out = moe.eager(experts, torch.randn(1, 3), torch.tensor([[2]]), torch.ones(1, 1))
    assert not out.any()


def test_the_balance_loss_of_an_even_router_is_top_k():
    logits = 20 * torch.eye(4).repeat(3, 1) + 10 * torch.eye(4).roll(1, 0).repeat(3, 1)
    sums = load_balancing.eager([logits, logits], num_experts=4, top_k=2)
    loss = load_balancing.of_sums(sums, num_experts=4)
    assert loss.item() == pytest.approx(2.0, rel=1e-4)


def test_the_balance_loss_equals_transformers_with_its_gradient():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = [torch.randn(7, 8, requires_grad=True) for _ in range(2)]
    is_real = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    for mask in (None, is_real):
        sums = load_balancing.eager(logits, num_experts=8, top_k=2, is_real=mask)
        ours = load_balancing.of_sums(sums, num_experts=8)
        row: Any = None if mask is None else mask[None].long()
        theirs = load_balancing_loss_func((logits[0], logits[1]), 8, 2, row)  # type: ignore[arg-type]
        assert isinstance(theirs, torch.Tensor)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss, logits) for loss in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
