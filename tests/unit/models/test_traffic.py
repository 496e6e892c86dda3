"""The formulas of what a rank sends, against sums made by hand for one shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.models.tensor_traffic import TokenTraffic, token_traffic
from omnilit.models.traffic import ModelWidths, StepShape, Traffic, step_traffic
from tests.helpers.models import tiny

# 3 layers of attention with 8 heads of 16, 2 for keys and values, 2 layers of experts
WIDTHS = ModelWidths(
    hidden=64,
    heads=8,
    kv_heads=2,
    key_width=16,
    value_width=16,
    top_k=2,
    attentions=3,
    expert_layers=2,
    splits_heads=True,
    split=TokenTraffic(forward=200, backward=600),
)
# 5 micro-batches of 96 tokens in bfloat16: each block runs 5 times forward and 5 times backward
STEP = StepShape(
    micro_batches=5,
    tokens=96,
    compute_bytes=2,
    reduce_bytes=4,
    is_recomputed=False,
    keeps_gathered=False,
)
ONE = ParallelSizes(dp_replicate_size=1, dp_shard_size=1)


def sent(
    step: StepShape = STEP, stage: int = 0, widths: ModelWidths = WIDTHS, **sizes: int
) -> dict[str, float]:
    chosen = replace(ONE, **sizes)
    found: list[Traffic] = step_traffic([], widths, chosen, step, stage=stage)
    return {one.axis: one.sent for one in found}


def test_one_rank_sends_nothing():
    assert sent() == {}


def test_tokens_go_to_their_experts_and_back():
    # 96 tokens to 2 experts each, 64 wide in 2 bytes, 3 of 4 ranks are others; 2 ways, 10 runs
    assert sent(ep_size=4, dp_shard_size=4) == {"ep": 96 * 2 * 64 * 2 * 3 / 4 * 2 * 10 * 2}


def test_ulysses_exchanges_queries_keys_values_and_outputs():
    # 48 tokens a rank; 8 heads out and back, 2 of keys and of values
    width = (8 + 2) * (16 + 16)
    assert sent(ulysses_size=2) == {"ulysses": 48 * width * 2 / 2 * 10 * 3}


def test_more_ranks_than_heads_of_keys_exchange_repeated_ones():
    # 24 tokens a rank; 2 heads of keys are repeated to 4
    width = (8 + 4) * (16 + 16)
    assert sent(ulysses_size=4) == {"ulysses": 24 * width * 2 * 3 / 4 * 10 * 3}


def test_context_parallel_ranks_gather_keys_and_values():
    own = 32 * 2 * (16 + 16) * 2  # 32 tokens a rank, 2 heads
    assert sent(cp_size=3) == {"cp": own * 2 * 10 * 3}


def test_in_a_ring_keys_and_values_go_round_and_the_sums_of_their_gradients_come_home():
    own = 32 * 2 * (16 + 16)
    there, home = own * 2 * 2 * 10 * 3, own * 4 * 3 * 5 * 3
    assert sent(replace(STEP, is_ring=True), cp_size=3) == {"cp": there + home}


def test_behind_ulysses_a_rank_gathers_its_heads_alone():
    own = 48 * 1 * (16 + 16) * 2  # 24 tokens of 2 ranks, 1 of 2 heads
    assert sent(cp_size=2, ulysses_size=2)["cp"] == own * 10 * 3


@pytest.mark.parametrize(("stage", "ends"), [(0, 1), (1, 0), (2, 1)])
def test_tensor_parallel_ranks_send_what_blocks_say_and_for_embedding_and_head(stage, ends):
    # 200 elements of a token in each of 5 runs forward, 600 in backward, two sums in a step's 5
    elements = 96 * (200 * 5 + 600 * 5 + ends * 2 * 64 * 5)
    assert sent(tp_size=2, pp_size=3, stage=stage)["tp"] == elements * 2 / 2
    assert sent(tp_size=2)["tp"] == 96 * (200 * 5 + 600 * 5 + 2 * 2 * 64 * 5) * 2 / 2


def test_spread_experts_get_each_token_from_one_of_its_ranks():
    found = sent(tp_size=2, ep_size=2)
    assert found["ep"] == 96 / 2 * 2 * 64 * 2 / 2 * 2 * 10 * 2


def test_heads_that_are_not_split_are_exchanged_by_every_rank():
    whole = replace(WIDTHS, splits_heads=False)
    exchanged = 48 * (8 + 2) * (16 + 16) * 2 / 2 * 10 * 3
    assert sent(widths=whole, tp_size=2, ulysses_size=2)["ulysses"] == exchanged
    assert sent(tp_size=2, ulysses_size=2)["ulysses"] == 48 * (4 + 2) * (16 + 16) * 2 / 2 * 10 * 3


@pytest.mark.parametrize(
    ("family", "with_experts", "forward", "backward"),
    [
        # rows: outputs of two matrices a layer; columns: inputs of q, k, v, gate and up
        ("qwen3", True, 2 * 2 * 2 * 64, 2 * 5 * 2 * 64),
        # experts: their output; their input and the weights of 2 experts
        ("qwen3_moe", True, 2 * 2 * 2 * 64, 2 * (3 * 2 * 64 + 2 * (64 + 2))),
        # shares of tokens are gathered, and so are the gradients of theirs
        ("qwen3_moe", False, 2 * (2 * 64 + 64), 2 * (3 * 2 * 64 + 64)),
        # whole attention; one dense layer, one of experts beside one that all tokens share
        ("deepseek_v3", True, (1 + 2) * 2 * 64, 2 * 2 * 64 + 2 * (64 + 2) + 2 * 2 * 64),
    ],
)
def test_a_token_costs_what_the_plan_splits(family, with_experts, forward, backward):
    found = token_traffic(tiny(family), with_experts=with_experts)
    assert (found.forward, found.backward) == (forward, backward)


@pytest.mark.parametrize(("stage", "ways"), [(0, 1), (1, 2), (2, 1)])
def test_stages_send_states_ahead_and_gradients_back(stage, ways):
    assert sent(stage=stage, pp_size=3) == {"pp": 96 * 64 * 2 * ways * 5}


@pytest.mark.parametrize(("stage", "ways"), [(0, 3), (1, 4), (2, 3)])
def test_every_stage_of_a_rank_sends_but_for_the_ends(stage, ways):
    interleaved = replace(STEP, stages_per_rank=2)
    assert sent(interleaved, stage=stage, pp_size=3) == {"pp": 96 * 64 * 2 * ways * 5}


def test_recomputing_sends_what_a_forward_sends_once_more():
    recomputed = replace(STEP, is_recomputed=True)
    assert sent(recomputed, ulysses_size=2)["ulysses"] == 1.5 * sent(ulysses_size=2)["ulysses"]
    assert sent(recomputed, cp_size=2)["cp"] == 1.5 * sent(cp_size=2)["cp"]
    assert sent(recomputed, pp_size=2) == sent(pp_size=2)


@pytest.mark.parametrize(
    ("family", "kv_heads", "key_width", "value_width", "experts"),
    [("qwen3", 2, 16, 16, 0), ("qwen3_moe", 2, 16, 16, 2), ("deepseek_v3", 4, 24, 16, 1)],
)
def test_widths_are_those_of_the_model(family, kv_heads, key_width, value_width, experts):
    found = ModelWidths.of(tiny(family), ONE)
    assert (found.hidden, found.heads, found.kv_heads) == (64, 4, kv_heads)
    assert (found.key_width, found.value_width) == (key_width, value_width)
    assert (found.attentions, found.expert_layers) == (2, experts)
    assert found.top_k == (2 if experts else 0)
