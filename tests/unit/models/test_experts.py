"""What transformers' plans say of experts, and what is refused before anything is split."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omnilit.errors import ConfigError
from omnilit.models.build import build_meta, load_model_config
from omnilit.models.experts import expert_plan, spread_experts
from tests.helpers.models import tiny_config

SHIPPED = Path(__file__).resolve().parents[3] / "configs" / "models" / "tiny_moe.json"
TWO_RANKS: Any = SimpleNamespace(size=lambda: 2)


def blank(family: str, **over: Any):
    return build_meta(tiny_config(family, **over), dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "layers", "num_parameters"),
    [("qwen3_moe", [0, 1], 2), ("gpt_oss", [0, 1], 4), ("deepseek_v3", [1], 2)],
)
def test_a_plan_names_the_experts_of_each_layer_and_then_the_module(family, layers, num_parameters):
    plan = expert_plan(blank(family))
    modules = [name for name, style in plan.items() if style == "ep_dispatch_experts"]
    assert modules == [f"model.layers.{layer}.mlp.experts" for layer in layers]
    assert len(plan) == len(layers) * (num_parameters + 1)
    names = list(plan)
    for module in modules:
        inside = [name for name in names if name.startswith(f"{module}.")]
        assert len(inside) == num_parameters
        assert max(map(names.index, inside)) < names.index(module)


def test_what_a_plan_says_of_other_modules_is_left_out():
    model = blank("qwen3_moe")
    before = expert_plan(model)
    model.ep_plan = {**model.ep_plan, "model.layers.*.self_attn.q_proj": "colwise"}
    assert expert_plan(model) == before


def test_experts_that_a_plan_splits_in_part_are_refused():
    model = blank("gpt_oss")
    rules = {rule: style for rule, style in model.ep_plan.items() if "down_proj_bias" not in rule}
    model.ep_plan = rules
    with pytest.raises(ConfigError) as caught:
        spread_experts(model, ep_mesh=TWO_RANKS, tp_mesh=TWO_RANKS)
    assert str(caught.value).startswith(
        "train.accelerator.ep_size: transformers' plan splits the experts of GptOssForCausalLM, "
        "but not model.layers.0.mlp.experts.down_proj_bias, model.layers.1.mlp."
    )


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match="no expert-parallel plan for 'llama'"):
        spread_experts(blank("llama"), ep_mesh=TWO_RANKS, tp_mesh=TWO_RANKS)


def test_the_shipped_mixture_has_a_plan_and_experts_for_its_ranks():
    config = load_model_config(str(SHIPPED), None, trust_remote_code=False)
    model = build_meta(config, dtype=torch.float32)
    assert len(expert_plan(model)) == 2 * 3
    assert config.num_experts % 2 == 0
