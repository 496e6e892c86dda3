"""What each expert is sent: every choice of a router once, real tokens only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from omnilit.callbacks.expert_load import ExpertCounter, load_numbers
from omnilit.config import GradientCheckpointingConfig
from omnilit.errors import ConfigError
from omnilit.models.bind import bind_kernels
from omnilit.models.recompute import enable_recomputation
from tests.helpers.models import packed_batch, tiny
from tests.helpers.spread import cpu_kernels


def holding(model: nn.Module) -> nn.Module:
    module = nn.Module()
    module.policy = model
    return module


def test_every_choice_is_counted_once_also_where_blocks_run_again():
    model = tiny("qwen3_moe")
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: seen.append(output[2]))
    binding, counter = bind_kernels(model, cpu_kernels()), ExpertCounter()
    enable_recomputation(model, GradientCheckpointingConfig(enable=True))
    counter.attach(holding(model))
    batch = packed_batch((7, 6))
    counter.listen(batch)
    losses = binding.head.forward(model, batch).token_losses
    counter.stop()
    losses.sum().backward()
    assert len(seen) == 4, "both layers ran twice"
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    expected = [torch.bincount(index.flatten(), minlength=8).tolist() for index in seen[:2]]
    assert counter.take() == dict(zip(names, expected, strict=True))
    assert sum(map(sum, counter.take().values())) == 0, "counts begin anew"


def test_padding_and_what_only_fills_a_window_is_not_counted():
    model, counter = tiny("qwen3_moe"), ExpertCounter()
    binding = bind_kernels(model, cpu_kernels())
    counter.attach(holding(model))
    batch = packed_batch((7, 6))
    for one in (replace(batch, num_padding=6), replace(batch, origins=())):
        counter.listen(one)
        binding.head.forward(model, one)
        counter.stop()
    assert [sum(part) for part in counter.take().values()] == [7 * 2, 7 * 2]


def test_detached_it_leaves_the_model_as_it_was():
    model, counter = tiny("qwen3_moe"), ExpertCounter()
    counter.attach(holding(model))
    assert sum(bool(module._forward_pre_hooks) for module in model.modules()) == 2
    counter.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_experts_is_refused():
    with pytest.raises(
        ConfigError, match=r"train\.log_expert_load_steps: the model has no experts"
    ):
        ExpertCounter().attach(holding(tiny("qwen3")))


def test_numbers_are_shares_and_their_largest_over_the_mean():
    assert load_numbers({"a": [1, 3, 0, 0], "b": [0, 0], "c": [2, 2]}) == {
        "a/0": 0.25, "a/1": 0.75, "a/2": 0.0, "a/3": 0.0, "a/max_over_mean": 3.0,
        "c/0": 0.5, "c/1": 0.5, "c/max_over_mean": 1.0,
    }  # fmt: skip
