"""Adapters over FlashAttention 2, 3 and 4, with stand-ins that compute by the eager reference.

The stand-ins have the libraries' own signatures, so a renamed or misplaced argument fails here.
Source: flash_attn 2.8.3, hopper/flash_attn_interface.py of flash-attention at 01afd16, and
flash_attn.cute of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from omnilit.errors import KernelError
from omnilit.kernels.adapters import flash_attention as adapters
from omnilit.kernels.attention import AttentionRule, eager
from omnilit.kernels.machine import Machine
from omnilit.kernels.slots import ATTENTION

KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
RULES = {
    "causal": AttentionRule(),
    "scaled": AttentionRule(scale=0.3),
    "window": AttentionRule(window=3),
    "capped": AttentionRule(softcap=1.5),
    "both ways": AttentionRule(is_causal=False),
    "both ways in a window": AttentionRule(is_causal=False, window=2),
}


def by_reference(q: Tensor, k: Tensor, v: Tensor, at: dict[str, Any]) -> Tensor:
    """[total, N, V] from rows, each pair of bounds a segment of its own."""
    left, right = at["window_size"]
    nothing = (None, -1)
    if at["causal"]:
        assert right in (0, -1)
    else:
        assert left == right
    rule = AttentionRule(
        scale=at["softmax_scale"],
        window=None if left in nothing else left + 1,
        softcap=at["softcap"] or None,
        is_causal=at["causal"],
    )
    for name in ("q", "k"):
        ends = at[f"cu_seqlens_{name}"]
        assert ends.dtype is torch.int32
        assert at[f"max_seqlen_{name}"] == int(ends.diff().max())
    out = []
    ends = (pairwise(at[f"cu_seqlens_{name}"].tolist()) for name in ("q", "k"))
    for (a, b), (c, d) in zip(*ends, strict=True):
        part = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
        sinks = at.get("learnable_sink")
        out.append(eager(*part, bounds=(0, b - a), rule=rule, sinks_N=sinks)[0])
    return torch.cat(out)


def varlen_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
             softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
             alibi_slopes=None, deterministic=False, return_attn_probs=False,
             block_table=None):  # fmt: skip
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    return by_reference(q, k, v, locals())


def varlen_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
             seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
             k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
             num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
             return_attn_probs=False):  # fmt: skip
    return by_reference(q, k, v, locals())


def varlen_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
             max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
             gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
             window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
             pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
             mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
             return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
             disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
             gather_bwd_token_chunk=None):  # fmt: skip
    return by_reference(q, k, v, locals()), None


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    for name, function in (
        ("flash_attn", varlen_2),
        ("flash_attn_interface", varlen_3),
        ("flash_attn.cute", varlen_4),
    ):
        module: Any = ModuleType(name)
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, name, module)
    # the stand-ins compute in float32, which the libraries do not take
    refuse = adapters._refuse
    monkeypatch.setattr(
        adapters, "_refuse", lambda name, q, **more: refuse(name, q.bfloat16(), **more)
    )


def qkv(
    tokens: int, *, keys: int | None = None, batch: int = 1, value_dim: int = 6
) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((4, tokens, 8), (2, keys or tokens, 8), (2, keys or tokens, value_dim))
    return [torch.randn(batch, *shape, generator=make).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("bounds", [(0, 1), (0, 13), (0, 4, 5, 13)])
@pytest.mark.parametrize("name", KERNELS)
def test_an_adapter_equals_eager_in_values_and_gradients(name, bounds, rule):
    inputs, found = qkv(bounds[-1]), []
    for kernel in (eager, getattr(adapters, name)):
        out = kernel(*inputs, bounds=bounds, rule=rule)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_with_a_cache_the_queries_are_the_last_tokens_of_each_row(name):
    inputs = qkv(2, keys=7, batch=3)
    arguments: Any = {"bounds": (0, 2), "rule": AttentionRule()}
    ours = getattr(adapters, name)(*inputs, **arguments)
    torch.testing.assert_close(ours, eager(*inputs, **arguments))


def test_only_the_fourth_version_has_sinks():
    inputs, sinks = qkv(5), torch.linspace(-1, 1, 4)
    arguments: Any = {"bounds": (0, 2, 5), "rule": AttentionRule(), "sinks_N": sinks}
    ours = adapters.flash_attention_4(*inputs, **arguments)
    torch.testing.assert_close(ours, eager(*inputs, **arguments))
    for name in KERNELS[:2]:
        with pytest.raises(KernelError, match=f"'{name}' has no attention sinks"):
            getattr(adapters, name)(*inputs, **arguments)


def test_dropout_reaches_the_second_version_and_is_refused_by_the_others(monkeypatch):
    seen = []
    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = lambda *args, **kw: seen.append(kw["dropout_p"]) or args[2]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = qkv(5, value_dim=8)
    inputs[2] = inputs[2].repeat_interleave(2, 1)
    arguments: Any = {"bounds": (0, 5), "rule": AttentionRule(dropout=0.1)}
    adapters.flash_attention_2(*inputs, **arguments)
    assert seen == [0.1]
    for name in KERNELS[1:]:
        with pytest.raises(KernelError, match=f"'{name}' has no dropout"):
            getattr(adapters, name)(*inputs, **arguments)


def test_float32_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(KernelError, match="'flash_attention_3' takes bfloat16, and was given"):
        adapters._refuse("flash_attention_3", torch.zeros(1))


def test_each_version_says_what_it_needs():
    packages = {"flash-attn": "2", "flash-attn-3": "3", "flash-attn-4": "4"}
    usable = {
        sm: [name for name in KERNELS if name in ATTENTION.usable(Machine("cuda", sm, packages))]
        for sm in (75, 80, 90, 100)
    }
    second, third, fourth = KERNELS
    assert usable == {75: [], 80: [second], 90: list(KERNELS), 100: [second, fourth]}
    assert third in ATTENTION
