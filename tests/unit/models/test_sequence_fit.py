"""Which models can have their sequences split in which way."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config import AcceleratorConfig
from omnilit.errors import ConfigError
from omnilit.models.sequence_fit import check_sequence_fit, sequence_problems
from tests.helpers.models import tiny_config

ASYNC: dict[str, Any] = {"ulysses_size": 2, "enable_async": True}
RING: dict[str, Any] = {"cp_size": 2, "cp_method": "ring"}


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2", "qwen3_moe", "gemma3"])
def test_models_whose_exchanges_overlap(family):
    assert not sequence_problems(tiny_config(family), AcceleratorConfig(**ASYNC, **RING))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "gemma2"])
def test_other_models_are_told_which_ones_do(family):
    config = tiny_config(family)
    with pytest.raises(ConfigError) as caught:
        check_sequence_fit(config, AcceleratorConfig(**ASYNC))
    assert str(caught.value) == (
        f"train.accelerator.enable_async: the attention of {config.model_type} is not among those "
        "whose exchanges are known to overlap: gemma3_text, llama, qwen2, qwen3, qwen3_moe. "
        "To fix: leave it out."
    )
    assert not sequence_problems(config, AcceleratorConfig(ulysses_size=2))


def test_a_ring_drops_no_attention_weights():
    config = tiny_config("qwen3", attention_dropout=0.1)
    (problem,) = sequence_problems(config, AcceleratorConfig(**RING))
    assert str(problem) == (
        "train.accelerator.cp_method: ring drops no attention weights, and the model has "
        "attention_dropout 0.1. To fix: set cp_method: gather, or attention_dropout: 0.0 in the "
        "model's configuration."
    )
    assert not sequence_problems(config, AcceleratorConfig(cp_size=2))


def test_chunks_are_not_divided_over_context():
    config = tiny_config("llama4")
    (problem,) = sequence_problems(config, AcceleratorConfig(cp_size=2))
    assert str(problem) == (
        "train.accelerator.cp_size: layers of llama4_text see their sequence in chunks "
        "(chunked_attention). To fix: use ulysses_size instead."
    )
    assert not sequence_problems(config, AcceleratorConfig(ulysses_size=2))
