"""The grouped products of experts beside a loop over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import tests.helpers.interpreted  # noqa: F401 - before anything that imports triton
from omnilit.kernels import moe as reference
from omnilit.kernels.triton import moe
from omnilit.kernels.triton.groups import TILE, sort_slots
from tests.helpers.beside import compare, leaf
from tests.helpers.models import tiny


def plain_experts(num_experts: int, hidden: int, inner: int, dtype: torch.dtype) -> Any:
    def gate(gate_up):
        first, second = gate_up.chunk(2, -1)
        return silu(first) * second

    return SimpleNamespace(
        gate_up_proj=leaf(num_experts, 2 * inner, hidden, dtype=dtype, scale=0.1),
        down_proj=leaf(num_experts, hidden, inner, dtype=dtype, scale=0.1),
        act_fn=silu,
        _apply_gate=gate,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        has_post_expert_norm=False,
    )


# 123 tokens are several tiles of an expert; 5 experts for 2 tokens leave most idle
@pytest.mark.parametrize(("tokens", "choices", "num_experts"), [(1, 1, 3), (2, 2, 5), (123, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_the_loop_with_idle_experts_and_skipped_ids(
    tokens, choices, num_experts, dtype
):
    experts = plain_experts(num_experts, 40, 24, dtype)
    hidden, weights = leaf(tokens, 40, dtype=dtype), torch.rand(tokens, choices, requires_grad=True)
    index = torch.randint(0, num_experts + 1, (tokens, choices))  # the last is past all experts
    index[index == 1] = 0  # expert 1 is idle
    leaves = [hidden, weights, experts.gate_up_proj, experts.down_proj]
    compare(
        lambda: moe.fused(experts, hidden, index, weights),
        lambda: reference.eager(experts, hidden, index, weights),
        leaves,
    )


def test_no_token_at_all_still_has_a_graph():
    experts = plain_experts(3, 16, 8, torch.float32)
    hidden = leaf(0, 16)
    out = moe.fused(experts, hidden, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    out.sum().backward()
    assert out.shape == (0, 16)
    assert not experts.gate_up_proj.grad.any()
    assert not experts.down_proj.grad.any()


def test_rows_that_are_not_contiguous_are_read_as_they_are():
    experts = plain_experts(3, 8, 8, torch.float32)
    wide, weights = leaf(7, 16), torch.rand(7, 2)
    index = torch.randint(0, 3, (7, 2))
    for hidden in (wide[:, :8], wide[:, ::2], leaf(8, 7).t()):
        ours = moe.fused(experts, hidden, index, weights)
        torch.testing.assert_close(ours, reference.eager(experts, hidden, index, weights))


# a bias and a gate of its own over interleaved columns; no gate; the plain form
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_moe"])
def test_every_form_of_transformers_experts_equals_its_own_code(family):
    model = _nemotron_h() if family == "nemotron_h" else tiny(family)
    experts: Any = next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))
    hidden, weights = leaf(9, experts.down_proj.shape[-2 if family != "gpt_oss" else -1]), None
    weights = torch.rand(9, 2, requires_grad=True)
    index = torch.randint(0, experts.num_experts - 1, (9, 2))  # the last expert is idle
    leaves = [hidden, weights, *experts.parameters()]
    model.set_experts_implementation("eager")
    compare(
        lambda: moe.fused(experts, hidden, index, weights),
        lambda: experts(hidden, index, weights),
        leaves,
    )


def _nemotron_h() -> Any:
    import transformers as hf

    config = hf.NemotronHConfig(
        vocab_size=256,
        hidden_size=32,
        layers_block_type=["moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    return AutoModelForCausalLM.from_config(config)


def test_a_norm_after_the_experts_is_applied():
    experts = plain_experts(3, 16, 8, torch.float32)
    experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.RMSNorm(16)
    hidden, index = torch.randn(5, 16), torch.randint(0, 3, (5, 1))
    ours = moe.fused(experts, hidden, index, torch.ones(5, 1))
    plain = reference.eager(experts, hidden, index, torch.ones(5, 1))
    torch.testing.assert_close(ours, experts.post_expert_norm(plain), rtol=1e-4, atol=1e-5)


def test_the_bits_of_a_token_do_not_depend_on_the_others():
    experts = plain_experts(4, 40, 24, torch.float32)
    hidden, weights = torch.randn(TILE + 9, 40), torch.rand(TILE + 9, 2)
    index = torch.randint(0, 4, (TILE + 9, 2))
    whole = moe.fused(experts, hidden, index, weights)
    for rows in (slice(0, 1), slice(5, 19), slice(TILE - 1, None)):
        assert torch.equal(
            moe.fused(experts, hidden[rows], index[rows], weights[rows]), whole[rows]
        )


def test_slots_keep_the_order_of_their_tokens():
    groups = sort_slots(torch.tensor([[2, 0], [0, 9], [2, 1]]), 3)
    assert groups.token.tolist() == [0, 1, 2, 0, 2, 1]
    assert groups.place.tolist() == [[3, 0], [1, 5], [4, 2]]
    assert groups.starts.tolist() == [0, 2, 3, 5, 6]
    assert groups.tile_group.tolist() == [0, 1, 2, 3]
    assert groups.tile_start.tolist() == [0, 2, 3, 5]


def test_a_group_longer_than_a_tile_has_several():
    groups = sort_slots(torch.zeros(2 * TILE + 1, 1, dtype=torch.long), 2)
    assert groups.tile_group.tolist() == [0, 0, 0, 3, 3]  # 3: not needed
    assert groups.tile_start.tolist()[:3] == [0, TILE, 2 * TILE]
