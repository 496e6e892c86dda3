"""Adapters against peft's own model: what is adapted, values, losses and gradients."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from omnilit.checkpoint.adapters import export_adapters
from omnilit.config import LoraArguments
from omnilit.errors import ConfigError, KernelError
from omnilit.models.bind import bind_kernels
from omnilit.models.lora import adapt, saved_tensors
from omnilit.models.lora.saved import describe_adapters, refuse_other_adapters
from omnilit.models.lora.values import draw
from tests.helpers.adapters import LORA, adapted, by_peft, disturb, peft_gradients, plan_of
from tests.helpers.models import gradients, packed_batch, reference_loss, tiny, worst_difference
from tests.helpers.spread import cpu_kernels

LENGTHS = (5, 1, 17, 9, 12)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, LoraArguments]] = {
    "dense": ("qwen3", LORA),
    "tied": ("qwen3_tied", replace(LORA, target_modules=["q_proj", "down_proj"])),
    "joined": ("phi3", replace(LORA, target_modules=["qkv_proj", "gate_up_proj"])),
    "biased": ("qwen2", replace(LORA, target_modules=r".*layers\.1\..*_proj", use_rslora=True)),
    "all of it": ("qwen3_moe", LORA),
    "experts": ("qwen3_moe", replace(LORA, target_modules=[], target_parameters=EXPERTS)),
    "transposed": ("gpt_oss", replace(LORA, target_parameters=EXPERTS)),
    "latent": ("deepseek_v3", replace(LORA, target_parameters=EXPERTS[:1])),
    "whole modules": ("qwen3", replace(LORA, modules_to_save=["lm_head", "model.norm"])),
}


def mean_loss(model, binding, batch):
    return binding.head.forward(model, batch).token_losses.sum() / batch.counts["tokens"]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_pefts_own_model(case):
    family, lora = CASES[case]
    batch = packed_batch(LENGTHS)
    model, binding, bound = adapted(family, lora)
    start = mean_loss(model, binding, batch)
    assert start.item() == pytest.approx(reference_loss(tiny(family), batch).item(), rel=1e-5)
    disturb(model)
    loss = mean_loss(model, binding, batch)
    assert abs(loss - start) > 1e-3  # adapters are not gone past
    loss.backward()
    bound.verify_called()
    expected = by_peft(family, lora, bound.plan, saved_tensors(model)).train()
    reference = reference_loss(expected, batch)  # type: ignore[arg-type]
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=2e-6)
    found = gradients(model)
    assert found.keys() == saved_tensors(model).keys()  # and nothing that is frozen
    assert worst_difference(found, peft_gradients(expected, bound.plan)) < 1e-4


def test_factors_start_as_pefts_do_and_depend_on_the_name_alone():
    plan = plan_of("qwen3_moe", replace(LORA, target_parameters=EXPERTS))
    for adapter in plan.adapters:
        first, second = draw(adapter, seed=1)
        assert (first.shape, second.shape) == adapter.shapes
        assert not second.any()
        bound = adapter.num_inputs**-0.5
        assert 0.9 * bound < first.abs().max() <= bound
        assert torch.equal(first, draw(adapter, seed=1)[0])
        assert not torch.equal(first, draw(adapter, seed=2)[0])
    firsts = [draw(adapter, seed=1)[0].flatten()[:8] for adapter in plan.adapters]
    assert len({tuple(values.tolist()) for values in firsts}) == len(firsts)


def test_the_layout_of_files_is_converted_there_and_back():
    for adapter in plan_of("gpt_oss", replace(LORA, target_parameters=EXPERTS)).adapters:
        pair = tuple(torch.randn(shape) for shape in adapter.shapes)
        file = adapter.to_file(*pair)
        assert tuple(tensor.shape for tensor in file) == adapter.file_shapes
        again = adapter.from_file(*file)
        assert all(torch.equal(one, other) for one, other in zip(pair, again, strict=True))


def test_a_model_without_dropout_in_evaluation():
    batch = packed_batch(LENGTHS)
    model, binding, _ = adapted("qwen3", replace(LORA, dropout=0.5))
    disturb(model)
    torch.manual_seed(0)
    first, second = (mean_loss(model, binding, batch).item() for _ in range(2))
    assert first != second
    model.eval()
    first, second = (mean_loss(model, binding, batch).item() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("family", "over", "message"),
    [
        (
            "qwen3",
            {"target_modules": ["q_porj"]},
            r"target_modules: 'q_porj' matches nothing .*'q_pro",
        ),
        ("qwen3", {"target_modules": "q_proj"}, r"target_modules: 'q_proj' matches nothing"),
        ("qwen3", {"target_modules": "("}, r"target_modules: '\(' matches nothing"),
        ("qwen3", {"target_modules": ["lm_head"]}, "lm_head embeds or predicts tokens"),
        ("qwen3", {"target_modules": ["embed_tokens"]}, "embed_tokens embeds or predicts tokens"),
        ("qwen3", {"target_modules": ["q_norm"]}, r"target_modules: .*not supported"),
        ("qwen3", {"exclude_modules": ["other"]}, "exclude_modules: 'other' matches nothing"),
        ("qwen3", {"exclude_modules": ".*"}, "target_modules: .*xcluded"),
        (
            "qwen3",
            {"target_parameters": EXPERTS},
            r"target_parameters: 'mlp\.experts\.gate_up_proj'",
        ),
        ("qwen3", {"modules_to_save": ["head"]}, "modules_to_save: 'head' matches nothing"),
        ("qwen3_tied", {"modules_to_save": ["lm_head"]}, "lm_head shares weight with another"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_what_can(family, over, message):
    with pytest.raises(ConfigError, match=rf"model\.lora\..*{message}"):
        plan_of(family, replace(LORA, **over))


def test_an_adapter_that_the_model_goes_past_is_an_error():
    model, binding, bound = adapted("qwen3", replace(LORA, target_modules=["q_proj"]))
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    matrix = layer.get_parameter("weight")
    layer.forward = lambda x: torch.nn.functional.linear(x, matrix)
    mean_loss(model, binding, packed_batch(LENGTHS))
    with pytest.raises(KernelError, match=r"1 adapters were never called, .*layers\.1\..*q_proj"):
        bound.verify_called()


def test_frozen_weights_are_kept_in_the_type_that_computes():
    model = tiny("qwen3")
    bind_kernels(model, cpu_kernels())
    plan = plan_of("qwen3", replace(LORA, modules_to_save=["lm_head"]))
    adapt(model, plan, compute=torch.bfloat16).add_factors(model, torch.float32)
    kinds = {(p.dtype, p.requires_grad) for p in model.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    assert model.get_parameter("lm_head.weight").dtype == torch.float32


def write_adapter(folder, family, lora):
    """A folder of adapters that are not at their start; returns their values by our names."""
    model, _, bound = adapted(family, lora)
    disturb(model)
    values = {name: tensor.detach().clone() for name, tensor in saved_tensors(model).items()}
    export_adapters(bound.plan, values, None, folder, dtype=torch.float32, base="base")
    return values


@pytest.mark.parametrize("case", ["experts", "whole modules"])
def test_training_may_start_from_an_adapter_of_peft(case, tmp_path):
    family, lora = CASES[case]
    values = write_adapter(tmp_path / "adapter", family, lora)
    model, *_ = adapted(family, replace(lora, adapter_path=str(tmp_path / "adapter")))
    found = saved_tensors(model)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"alpha": 3.0}, r"was made with alpha 12\."),
        ({"rank": 2, "use_rslora": True}, "was made with rank 4, use_rslora False"),
        ({"target_modules": ["q_proj"]}, "adapts something else: .*k_proj"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(over, message, tmp_path):
    write_adapter(tmp_path / "adapter", "qwen3", LORA)
    with pytest.raises(ConfigError, match=rf"model\.lora\.adapter_path: .*{message}"):
        adapted("qwen3", replace(LORA, adapter_path=str(tmp_path / "adapter"), **over))
    with pytest.raises(ConfigError, match="no adapter can be read from"):
        adapted("qwen3", replace(LORA, adapter_path=str(tmp_path)))


@pytest.mark.parametrize(
    "entry", [{"alpha_pattern": {"q_proj": 64}}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_an_adapter_that_peft_computes_otherwise_is_refused(entry, tmp_path):
    write_adapter(tmp_path, "qwen3", LORA)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | entry))
    with pytest.raises(ConfigError, match=f"was made with {next(iter(entry))}: .*not available"):
        adapted("qwen3", replace(LORA, adapter_path=str(tmp_path)))


def test_a_resume_keeps_the_strength_of_what_was_saved():
    saved = describe_adapters(LORA, base="models/base")
    refuse_other_adapters(saved, replace(LORA, dropout=0.1))
    refuse_other_adapters(None, LORA)
    with pytest.raises(ConfigError, match=r"model\.lora\.alpha: the checkpoint is of 12\.0"):
        refuse_other_adapters(saved, replace(LORA, alpha=13.0))
    assert describe_adapters(LoraArguments(), base=None) is None
