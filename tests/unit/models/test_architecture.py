from __future__ import annotations

import pytest
import torch
import transformers as hf

from omnilit.errors import ConfigError
from omnilit.models.architecture import choose_language_model, choose_towers, has_towers
from omnilit.models.build import build_meta
from tests.helpers.media_models import media_config
from tests.helpers.models import tiny_config


def test_a_task_chooses_between_a_language_model_and_the_one_with_towers():
    config = media_config("qwen3_5")
    assert type(build_meta(config, dtype=torch.float32)) is hf.Qwen3_5ForConditionalGeneration
    choose_language_model(config)
    assert type(build_meta(config, dtype=torch.float32)) is hf.Qwen3_5ForCausalLM
    choose_towers(config)
    assert has_towers(config)


def test_a_model_with_towers_is_no_language_model():
    config = media_config("qwen3_vl")
    choose_language_model(config)
    with pytest.raises(ConfigError, match=r"is not a causal language model.*class_path: VLMModule"):
        build_meta(config, dtype=torch.float32)


def test_a_language_model_takes_no_media():
    with pytest.raises(ConfigError, match="takes neither images nor videos nor sounds"):
        choose_towers(tiny_config("qwen3"))


def test_other_configurations_are_left_as_they_are():
    config = tiny_config("qwen3", architectures=["Qwen3ForCausalLM"])
    choose_language_model(config)
    assert config.architectures == ["Qwen3ForCausalLM"]
