"""RMSNorm, rotary embedding and the balance loss beside their references."""

from __future__ import annotations

import pytest
import torch

import tests.helpers.interpreted  # noqa: F401 - before anything that imports triton
from omnilit.kernels import load_balancing as balance_reference
from omnilit.kernels import rms_norm as norm_reference
from omnilit.kernels import rope as rotary_reference
from omnilit.kernels.triton import load_balancing, rms_norm, rope
from tests.helpers.beside import compare, leaf

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("shape", [(1, 6), (37, 8), (2, 5, 3, 16), (0, 8)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@TYPES
def test_rms_norm_equals_the_reference(shape, offset, dtype):
    x, weight = leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype)
    compare(
        lambda: rms_norm.rms_norm(x, weight, eps=1e-6, offset=offset),
        lambda: norm_reference.eager(x, weight, eps=1e-6, offset=offset),
        (x, weight),
    )


def test_rms_norm_of_a_narrow_input_and_a_wide_weight_is_wide():
    x, weight = leaf(3, 5, dtype=torch.bfloat16), leaf(5)
    compare(
        lambda: rms_norm.rms_norm(x, weight, eps=1e-5),
        lambda: norm_reference.eager(x, weight, eps=1e-5),
        (x, weight),
    )


def test_rms_norm_gives_the_same_bits_twice_and_in_parts():
    x, weight = leaf(40, 24), leaf(24)
    grads = []
    for _ in range(2):
        out = rms_norm.rms_norm(x, weight, eps=1e-6)
        grads.append(torch.autograd.grad(out.square().sum(), (x, weight)))
        assert torch.equal(rms_norm.rms_norm(x[5:9], weight, eps=1e-6), out[5:9])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("head_dim", [1, 2])
@TYPES
def test_rotary_equals_the_reference(head_dim, dtype):
    # the heads of q and k stand where attention's projections leave them: not contiguous
    q, k = leaf(2, 3, 5, 12, dtype=dtype), leaf(2, 3, 2, 12, dtype=dtype)
    angles = torch.randn(1, 3, 6).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    views = (q, k) if head_dim == 2 else (q.transpose(1, 2), k.transpose(1, 2))
    compare(
        lambda: rope.rotary(*views, cos, sin, unsqueeze_dim=head_dim),
        lambda: rotary_reference.eager(*views, cos, sin, unsqueeze_dim=head_dim),
        (q, k),
    )


def test_rotary_turns_each_row_of_a_batch_by_its_own_angles():
    q, k, angles = leaf(2, 3, 1, 8), leaf(2, 3, 1, 8), torch.randn(2, 1, 4).repeat(1, 1, 2)
    compare(
        lambda: rope.rotary(q, k, angles.cos(), angles.sin()),
        lambda: rotary_reference.eager(q, k, angles.cos(), angles.sin()),
        (q, k),
    )


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "has_padding"),
    [(1, 4, 1, False), (7, 8, 2, False), (7, 8, 2, True), (67, 5, 3, True)],
)
@TYPES
def test_the_balance_loss_equals_the_reference(tokens, experts, top_k, has_padding, dtype):
    logits = [leaf(tokens, experts, dtype=dtype) for _ in range(2)]
    is_real = torch.arange(tokens) % 3 > 0 if has_padding else None
    compare(
        lambda: load_balancing.sums(logits, num_experts=experts, top_k=top_k, is_real=is_real),
        lambda: balance_reference.eager(logits, num_experts=experts, top_k=top_k, is_real=is_real),
        logits,
    )


def test_equal_probabilities_are_chosen_once_each():
    sums = load_balancing.sums([torch.zeros(3, 5)], num_experts=5, top_k=5)
    assert sums[:5].tolist() == [3.0] * 5
