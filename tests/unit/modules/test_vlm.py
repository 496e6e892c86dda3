"""What VLMModule trains, at which rate, and what it refuses."""

from __future__ import annotations

import pytest

from omnilit.config import AcceleratorConfig, LoraArguments, OptimizerConfig, TrainingArguments
from omnilit.errors import ConfigError
from omnilit.models.towers import Towers
from omnilit.modules import VLMModule
from omnilit.optim.build import build_optimizer
from omnilit.optim.schedules import AbsoluteSchedule
from tests.helpers.media_models import media_config, tiny_media
from tests.helpers.models import tiny_config


def test_stages_of_a_pipeline_are_refused():
    train = TrainingArguments(accelerator=AcceleratorConfig(pp_size=2))
    with pytest.raises(ConfigError, match=r"pp_size: a model with towers cannot be cut"):
        VLMModule(config_path="unused", train=train)


def test_frozen_towers_beside_adapters_are_refused():
    train = TrainingArguments(freeze_vit=True)
    with pytest.raises(ConfigError, match=r"train\.freeze_vit: adapters freeze the whole model"):
        VLMModule(model_path="unused", lora=LoraArguments(enable=True), train=train)


def test_work_is_shared_as_a_known_algorithm_says():
    known = "post_mbs_balancing_greedy_without_pad"
    with pytest.raises(ConfigError, match=rf"sorting_algo: 'mine' is not known.*one of {known}"):
        VLMModule(config_path="unused", encoder_data_balance_sorting_algo="mine")
    assert VLMModule(config_path="unused", encoder_data_balance=True).shares_media
    nothing = {"encoder_data_balance": None, "encoder_data_balance_sorting_algo": None}
    assert not VLMModule(config_path="unused", **nothing).shares_media


def test_a_model_that_takes_no_media_is_refused(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="takes neither images nor videos nor sounds"):
        _ = VLMModule(config_path=str(tmp_path)).model_config


def test_the_class_with_towers_is_what_is_trained(tmp_path):
    config = media_config("qwen3_5")
    config.architectures = None
    config.save_pretrained(tmp_path)
    found = VLMModule(config_path=str(tmp_path)).model_config
    assert found.architectures == ["Qwen3_5ForConditionalGeneration"]


def test_a_tower_has_a_rate_of_its_own_with_its_own_warm_up_decay_and_floor():
    config = OptimizerConfig(
        lr=1e-2,
        lr_min=1e-3,
        lr_warmup_ratio=0.5,
        lr_decay_style="linear",
        weight_decay=0.1,
        no_decay_params=["bias"],
    )
    model = tiny_media("qwen3_vl")
    part_of = Towers.of(model).part_of
    optimizer = build_optimizer(model, config, part_of=part_of, rates={"vision_tower": 5e-4})
    schedule = AbsoluteSchedule(optimizer, config, total_steps=4)
    rates: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    for _ in range(5):
        for group in optimizer.param_groups:
            rates[group["name"]].append(group["lr"])
        schedule.step()
    assert rates["backbone"] == pytest.approx([0.0, 5e-3, 1e-2, 5.5e-3, 1e-3])
    # the floor of the others lies above its highest rate, where it stays
    assert rates["vision_tower"] == pytest.approx([0.0, 2.5e-4, 5e-4, 5e-4, 5e-4])
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {
        "backbone": 0.1,
        "vision_tower": 0.1,
        "vision_tower/no_decay": 0.0,
    }
    biases = {id(p) for n, p in model.named_parameters() if n.endswith("bias")}
    exempt = next(g for g in optimizer.param_groups if g["name"] == "vision_tower/no_decay")
    assert {id(p) for p in exempt["params"]} == biases


def test_a_tower_that_is_not_there_is_not_frozen():
    model = tiny_media("qwen3_vl")
    with pytest.raises(ConfigError, match=r"freeze_audio_tower: .* has no such tower"):
        Towers.of(model).freeze(model, vision=False, audio=True)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_omni_thinker", "smolvlm"])
def test_a_frozen_tower_leaves_the_rest_trainable(family):
    model = tiny_media(family)
    towers = Towers.of(model)
    towers.freeze(model, vision=True, audio=False)
    trained = {towers.part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        "qwen3_vl": {"backbone"},
        "qwen2_5_omni_thinker": {"backbone", "audio_tower", "vision_tower"},  # its merger
        "smolvlm": {"backbone", "projector"},
    }
    assert trained == expected[family]
