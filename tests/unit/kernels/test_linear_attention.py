"""The references of linear attention beside its definition and beside transformers."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import silu

from omnilit.kernels import linear_attention
from tests.helpers.recurrence import check_rule, delta_inputs, delta_rule

# One token, one chunk and less than one; bounds at, before and behind the end of a chunk of 64
ROWS = (
    (0, 1),
    (0, 3, 7),
    (0, 123),
    (0, 5, 64, 65, 70, 128, 200),
    (0, 1, 2, 149, 150),
    (0, 64, 192),
)


def test_gated_norm_equals_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    norm, x, gate = Qwen3NextRMSNormGated(8, eps=1e-5), torch.randn(3, 8), torch.randn(3, 8)
    torch.nn.init.normal_(norm.weight)
    ours = linear_attention.rms_norm_gated(x, gate, norm.weight, eps=1e-5)
    torch.testing.assert_close(ours, norm(x, gate))


def test_convolution_sees_the_past_of_its_own_segment():
    x, weight, bias = torch.randn(6, 2), torch.randn(2, 3), torch.randn(2)
    out = linear_attention.causal_conv1d(x, weight, bias, bounds=(0, 4, 6))
    third = silu((x[1:4] * weight.t()).sum(0) + bias)
    first_of_second = silu(x[4] * weight[:, 2] + bias)
    torch.testing.assert_close(out[3], third)
    torch.testing.assert_close(out[4], first_of_second)
    assert out.shape == x.shape


@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_convolution_equals_qwen3_next_a_segment_at_a_time(bounds):
    from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn

    convolve = inspect.unwrap(causal_conv1d_fn)
    x = torch.randn(bounds[-1], 6, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    ours = linear_attention.causal_conv1d(x, weight, None, bounds=bounds)
    theirs = torch.cat(
        [convolve(x[a:b].t()[None], weight, activation="silu")[0].t() for a, b in pairwise(bounds)]
    )
    torch.testing.assert_close(ours, theirs)
    along = torch.randn_like(ours)
    for got, expected in zip(
        *(torch.autograd.grad(out, (x, weight), along) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_delta_rule_by_chunks_equals_its_definition(bounds):
    # float32 beside float64; the largest measured is 3e-6
    check_rule(linear_attention.chunk_gated_delta_rule, bounds, bound=1e-5)


def test_delta_rule_equals_qwen3_next_a_segment_at_a_time():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    bounds = (0, 70, 75, 200)
    inputs = delta_inputs(200)
    ours = linear_attention.chunk_gated_delta_rule(*inputs, bounds=bounds)
    for a, b in pairwise(bounds):
        q, k, v, log_decay, beta = (x[None, a:b] for x in inputs)
        theirs, _ = torch_chunk_gated_delta_rule(
            q, k, v, log_decay, beta, use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(ours[a:b], theirs[0], rtol=1e-4, atol=1e-5)


def test_delta_rule_of_bfloat16_is_that_of_float32_but_for_its_rounding():
    inputs = delta_inputs(100, dtype=torch.bfloat16)
    out = linear_attention.chunk_gated_delta_rule(*inputs, bounds=(0, 30, 100))
    wide = linear_attention.chunk_gated_delta_rule(
        *(x.detach().float() for x in inputs), bounds=(0, 30, 100)
    )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.to(torch.bfloat16))


def test_short_queries_and_keys_are_normalised_as_transformers_does():
    q, k, v, log_decay, beta = (x.detach() for x in delta_inputs(40))
    q, k = q * 1e-3, k * 1e-3  # so that what is added to their length matters
    ours = linear_attention.chunk_gated_delta_rule(q, k, v, log_decay, beta, bounds=(0, 40))
    torch.testing.assert_close(
        ours.double(), delta_rule(q, k, v, log_decay, beta, bounds=(0, 40)), rtol=1e-4, atol=1e-6
    )
