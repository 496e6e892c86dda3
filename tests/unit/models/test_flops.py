"""What a step costs, against torch's own counter and against the textbook's formula."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.functional import pad, silu
from torch.utils.flop_counter import FlopCounterMode

from omnilit.config import OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.bind import bind_kernels
from omnilit.models.build import build_meta
from omnilit.models.delta_net import bound_linear_attention
from omnilit.models.flops import (
    causal_pairs,
    count_adapter_flops,
    count_flops,
)
from tests.helpers.adapters import LORA, adapted
from tests.helpers.models import packed_batch, tiny, tiny_config
from tests.helpers.recurrence import delta_rule
from tests.sweep import tiny as sweep

LENGTHS = (5, 13, 30, 1)
FAMILIES = (
    "llama", "qwen2", "qwen3", "qwen3_tied", "gemma2", "gemma3", "qwen3_moe", "deepseek_v3",
    "gpt_oss",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_bound_model_costs_what_torch_counts(family):
    """The eager kernels compute whole squares of scores: so squares are asked for here."""
    model = tiny(family)
    flops = count_flops(model)
    assert flops is not None
    kernels = resolve_kernels(
        OpsImplementationConfig(preset="eager"), given=frozenset(), machine=Machine()
    )
    head, batch = bind_kernels(model, kernels).head, packed_batch(LENGTHS)
    with FlopCounterMode(display=False) as counter:
        head.forward(model, batch).token_losses.sum().backward()
    squares = sum(length**2 for length in LENGTHS)
    pairs = sum(layer.per_pair for layer in flops.attention) * squares
    dense = flops.per_token * sum(LENGTHS) + flops.per_target * batch.counts["tokens"]
    assert counter.get_total_flops() == 3 * (dense + pairs)


def by_windows(x, weight, bias, *, bounds):
    """The convolution as the product of each token's window with the filters."""
    gap = weight.shape[-1] - 1
    parts = [pad(x[a:b], (0, 0, gap, 0)).unfold(0, gap + 1, 1) for a, b in pairwise(bounds)]
    return silu(torch.einsum("tcw,cw->tc", torch.cat(parts), weight))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "qwen3_5_moe", "olmo_hybrid"])
def test_linear_attention_costs_what_torch_counts_of_its_definition(family):
    model = tiny(family)
    flops = count_flops(model)
    assert flops is not None
    kernels = resolve_kernels(
        OpsImplementationConfig(preset="eager"), given=frozenset(), machine=Machine()
    )
    head, batch = bind_kernels(model, kernels).head, packed_batch(LENGTHS)
    linear = bound_linear_attention(model)
    assert linear is not None
    linear.convolution = by_windows
    linear.rule = lambda *args, bounds: delta_rule(*args, bounds=bounds).float()
    with FlopCounterMode(display=False) as counter:
        head.forward(model, batch).token_losses.sum().backward()
    squares = sum(length**2 for length in LENGTHS)
    pairs = sum(layer.per_pair for layer in flops.attention) * squares
    dense = flops.per_token * sum(LENGTHS) + flops.per_target * batch.counts["tokens"]
    assert counter.get_total_flops() == 3 * (dense + pairs)


@pytest.mark.parametrize("over", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_step_of_adapters_costs_what_torch_counts(over):
    """But for the first layer's projections, whose input wants no gradient."""
    eager = OpsImplementationConfig(preset="eager")
    model, binding, bound = adapted("qwen3", replace(LORA, **over), ops=eager)
    whole = count_flops(tiny("qwen3"))
    assert whole is not None
    flops, batch = count_adapter_flops(whole, model, bound.plan), packed_batch(LENGTHS)
    with FlopCounterMode(display=False) as counter:
        binding.head.forward(model, batch).token_losses.sum().backward()
    counted = counter.get_total_flops()
    spared = counted_less(bound.plan, model) * sum(LENGTHS)
    dense = flops.of_step(LENGTHS, int(batch.counts["tokens"]))
    squares = sum(layer.per_pair * length**2 for layer in flops.attention for length in LENGTHS)
    triangles = sum(
        layer.per_pair * causal_pairs(length, layer.window)
        for layer in flops.attention
        for length in LENGTHS
    )
    assert counted == dense + 3 * (squares - triangles) - spared


def counted_less(plan, model):
    """A token's share of what is not computed in the first layer: no gradient of its input."""
    first = [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")]
    factors = sum(2 * a.rank * a.num_inputs for a in plan.adapters if a.module in first)
    return factors + sum(2 * model.get_parameter(f"{name}.weight").numel() for name in first)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_step_costs_what_the_textbooks_formula_says(family):
    """6 N per token and 6 a s^2 a layer and sequence: causal attention counts as half of 12."""
    config: Any = tiny_config(family, num_hidden_layers=3)
    flops = count_flops(build_meta(config, dtype=torch.float32))
    assert flops is not None
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    a, b = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    mlp = 3 * hidden * config.intermediate_size
    if family == "qwen3_moe":
        mlp = hidden * config.num_experts
        mlp += 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    per_layer = mlp + hidden * (2 * a + 2 * b)
    squares = sum(length**2 for length in LENGTHS)
    expected = 6 * layers * per_layer * sum(LENGTHS) + 6 * hidden * vocabulary * 20
    expected += 6 * layers * a * squares
    assert flops.of_step(LENGTHS, 20) == expected


def test_shared_experts_and_latent_attention_are_counted():
    config: Any = tiny_config("deepseek_v3")
    one = count_flops(build_meta(config, dtype=torch.float32))
    config.n_shared_experts = 3
    three = count_flops(build_meta(config, dtype=torch.float32))
    assert one is not None
    assert three is not None
    assert three.per_token - one.per_token == 2 * 2 * 3 * 64 * 32  # in the one sparse layer
    assert one.attention[0].per_pair == 2 * 2 * 4 * (24 + 16)  # keys of 24, values of 16


def test_a_window_hides_what_lies_behind_it():
    assert causal_pairs(10) == causal_pairs(10, 10) == causal_pairs(10, 99) == 50
    assert causal_pairs(100, 8) == 8 * 100 - 32
    flops = count_flops(tiny("gemma3"))  # a layer with a window of 8, one without
    assert flops is not None
    near, far = flops.of_step([8] * 10, 0), flops.of_step([80], 0)
    assert far - near == 3 * 256 * (causal_pairs(80, 8) + causal_pairs(80) - 20 * causal_pairs(8))


def test_padding_and_what_fills_a_window_cost_nothing():
    flops = count_flops(tiny("qwen3"))
    assert flops is not None
    batch = packed_batch((10, 20, 6))
    targets = round(batch.counts["tokens"])
    assert flops.of_batch(batch) == flops.of_step((10, 20, 6), targets)
    padded = replace(batch, num_padding=6, origins=batch.origins[:2])
    assert flops.of_batch(padded) == flops.of_step((10, 20), targets)
    assert flops.of_batch(replace(batch, origins=(), counts={"tokens": 0})) == 0


def test_a_model_of_unknown_layers_gets_no_number():
    model = tiny("qwen3")
    model.model.layers[0].self_attn = torch.nn.Linear(4, 4)
    assert count_flops(model) is None
    stacked = tiny("qwen3")  # a stack of matrices, and no word on how many a token meets
    stacked.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    assert count_flops(stacked) is None
    odd = tiny("qwen3")
    for layer in odd.model.layers:
        del layer.self_attn.head_dim
    assert count_flops(odd) is None
    del odd.lm_head
    odd.lm_head = torch.nn.Identity()
    assert count_flops(odd) is None


TEXT = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip


def vision_models() -> dict[str, hf.PreTrainedModel]:
    tower = {"depth": 3, "num_heads": 4, "hidden_size": 64, "patch_size": 4}
    two = hf.Qwen2VLConfig(text_config=TEXT, vision_config={**tower, "embed_dim": 32})
    more = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    more |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    three = hf.Qwen3VLConfig(text_config={**TEXT, "head_dim": 16}, vision_config={**tower, **more})
    return {
        "qwen2_vl": hf.Qwen2VLForConditionalGeneration._from_config(
            two, attn_implementation="eager"
        ),
        "qwen3_vl": hf.Qwen3VLForConditionalGeneration._from_config(
            three, attn_implementation="eager"
        ),
    }


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_language_part_of_a_vision_model_is_counted_without_its_tower(family):
    flops = count_flops(vision_models()[family])
    assert flops is not None
    assert flops == count_flops(tiny("llama"))  # of the same sizes


def test_layers_may_differ_in_numbers_that_their_attention_says_itself():
    config = sweep.tiny_config("dots3_note")  # which raises where it is asked for heads
    assert config.get_text_config().is_heterogeneous
    flops = count_flops(build_meta(config, dtype=torch.float32))
    assert flops is not None
    assert flops.of_step([5], 3) > flops.of_step([4], 3)
