"""Models cut into stages: what each keeps, and which models cannot be cut."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from omnilit.errors import ConfigError
from omnilit.models.build import build_meta
from omnilit.models.stages import (
    CutPlan,
    StageRange,
    check_cut,
    cut_model,
    find_uncut,
    own_stages,
)
from tests.helpers.models import tiny, tiny_config

LAYERS = 4
DEEP = {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
CUTTABLE = (
    *("qwen3", "llama", "qwen2", "qwen3_moe", "gemma3", "gemma2"),
    *("phi", "phi3", "gpt_oss", "deepseek_v2", "deepseek_v3"),
)


def bare(config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    return build_meta(config, dtype=torch.float32)


def stages_of(rank: int, *, size: int, per_rank: int = 1) -> list[StageRange]:
    return own_stages(rank, size=size, num_stages=size * per_rank, num_layers=LAYERS)


@given(num_layers=st.integers(1, 200), size=st.integers(1, 16), per_rank=st.integers(1, 4))
def test_every_layer_is_in_one_stage_and_shares_are_even(num_layers, size, per_rank):
    number = size * per_rank
    every = [
        stage
        for rank in range(size)
        for stage in own_stages(rank, size=size, num_stages=number, num_layers=num_layers)
    ]
    every.sort(key=lambda stage: stage.number)
    assert [stage.number for stage in every] == list(range(number))
    assert [layer for stage in every for layer in range(stage.start, stage.stop)] == list(
        range(num_layers)
    )
    lengths = {stage.stop - stage.start for stage in every}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_family_is_cut_by_its_own_plan(family: str):
    assert not find_uncut(bare(tiny_config(family)))


def test_a_family_that_makes_a_balance_loss_is_cut():
    config = tiny_config("qwen3_moe", output_router_logits=True)
    assert not find_uncut(bare(config))
    assert config.output_router_logits


def test_a_plan_names_what_is_before_and_behind_the_layers():
    plan = CutPlan.of(tiny("qwen3"))
    assert plan == CutPlan(("model.embed_tokens",), "model.layers", ("model.norm", "lm_head"))


def test_stages_hold_every_parameter_once_under_its_name():
    whole = dict(tiny("qwen3", **DEEP).named_parameters())
    held: dict[str, Tensor] = {}
    for rank in range(2):
        model = tiny("qwen3", **DEEP)
        cut_model(model, stages_of(rank, size=2, per_rank=2))
        own = dict(model.named_parameters())
        assert not held.keys() & own.keys()
        held |= own
    assert held.keys() == whole.keys()
    assert all(torch.equal(held[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("size", "per_rank"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_stages_one_after_the_other_are_the_model(size: int, per_rank: int):
    whole = tiny("qwen3", **DEEP)
    ids, positions = torch.arange(3, 13)[None], torch.arange(10)[None]
    expected = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
    by_number: dict[int, nn.Module] = {}
    for rank in range(size):
        stages = stages_of(rank, size=size, per_rank=per_rank)
        parts = cut_model(tiny("qwen3", **DEEP), stages)
        by_number |= {stage.number: part for stage, part in zip(stages, parts, strict=True)}
    state = by_number[0](input_ids=ids, position_ids=positions, use_cache=False).logits
    for number in range(1, len(by_number)):
        part = by_number[number]
        state = part(inputs_embeds=state, position_ids=positions, use_cache=False).logits
    assert torch.equal(state, expected)


def test_stages_of_one_rank_share_the_modules_of_its_model():
    model = tiny("qwen3", **DEEP)
    first, last = cut_model(model, stages_of(0, size=1, per_rank=2))
    assert first is not model
    assert first.model.layers[0] is model.model.layers[0]
    assert not list(first.model.layers[3].parameters())
    assert last.model.layers[3] is model.model.layers[3]
    assert last.lm_head is model.lm_head
    assert not list(first.lm_head.parameters())
    assert len(list(model.parameters())) == len(list(tiny("qwen3", **DEEP).parameters()))


def test_what_gets_memory_in_the_model_has_it_in_its_stages():
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(tiny_config("qwen3", **DEEP))
    parts = cut_model(model, stages_of(1, size=2, per_rank=2))
    model.to_empty(device="cpu")
    for part in parts:
        assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))


def refusal(config: hf.PreTrainedConfig) -> str:
    (problem,) = find_uncut(bare(config))
    assert problem.key == "train.accelerator.pp_size"
    return problem.problem


def test_a_model_that_changes_what_goes_into_its_layers_is_refused():
    model = tiny("qwen3")

    def scale(_: nn.Module, args: tuple[()], kwargs: dict[str, Tensor]):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * 12.0}

    model.model.register_forward_pre_hook(scale, with_kwargs=True)
    with pytest.raises(ConfigError) as caught:
        check_cut(model)
    assert str(caught.value) == (
        "train.accelerator.pp_size: Qwen3ForCausalLM cannot be cut into stages: its own code "
        "changes what one layer hands to the next, and stages would repeat it. To fix: leave "
        "pp_size out, or train another model."
    )


def test_a_model_that_does_not_run_without_its_layers_is_refused():
    model = tiny("qwen3")

    def look(_: nn.Module, args: tuple[()]) -> None:
        raise IndexError("there is no layer 0")

    model.model.register_forward_pre_hook(look)
    with pytest.raises(ConfigError, match=r"does not run without its layers \(there is no layer 0"):
        check_cut(model)


def test_a_model_without_a_plan_is_refused():
    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256)
    assert "transformers does not say how it is cut" in refusal(config)


def test_parameters_that_no_stage_would_have_are_refused():
    model = tiny("qwen3")
    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"no stage of its pp_plan has 2 tensors: model\.extra"):
        check_cut(model)


def test_checking_a_cut_leaves_the_model_as_it_is():
    model, other = tiny("qwen3"), tiny("qwen3")
    check_cut(model)
    names = [name for name, _ in model.named_modules()]
    assert names == [name for name, _ in other.named_modules()]
    ids = torch.arange(3, 13)[None]
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
