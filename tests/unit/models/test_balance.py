"""The balance loss of a micro-batch: transformers' own, of real tokens, with their share."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from omnilit.config import GradientCheckpointingConfig
from omnilit.errors import ConfigError
from omnilit.kernels import load_balancing
from omnilit.models.balance import RouterBalance
from omnilit.models.bind import bind_kernels
from omnilit.models.calls import CallCounter
from omnilit.models.recompute import enable_recomputation
from tests.helpers.gradients import compare, gradients_of
from tests.helpers.models import packed_batch, tiny
from tests.helpers.spread import cpu_kernels

ASKED: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.25}


def bound(family: str, **over: Any):
    model = tiny(family, **over)
    return model, bind_kernels(model, cpu_kernels())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_it_is_that_of_transformers_once_a_supervised_token(family, is_recomputed):
    batch = packed_batch((9,))
    plain, (model, binding) = tiny(family, **ASKED), bound(family, **ASKED)
    enable_recomputation(model, GradientCheckpointingConfig(enable=is_recomputed))
    expected = plain(input_ids=batch.input_ids, use_cache=False).aux_loss
    output = binding.forward(model, batch)
    assert output.balance is not None
    torch.testing.assert_close(output.balance, 0.25 * batch.counts["tokens"] * expected)
    (0.25 * batch.counts["tokens"] * expected).backward()
    output.balance.backward()
    reached = {n for n, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in (*plain.named_parameters(), *model.named_parameters()):
        if name not in reached:
            parameter.requires_grad = False
    assert any("router" in name or "gate." in name for name in reached)
    compare(gradients_of(model), gradients_of(plain))
    binding.verify_called()


def test_padding_is_not_counted():
    model, binding = bound("qwen3_moe", **ASKED)
    batch = packed_batch((7, 6))
    batch.labels[:, 7:] = -100
    padded = replace(batch, num_padding=6, counts={})
    alone = replace(
        batch,
        input_ids=batch.input_ids[:, :7],
        labels=batch.labels[:, :7],
        position_ids=batch.position_ids[:, :7],
        bounds=[0, 7],
    )
    with torch.no_grad():
        found = [cast("Tensor", binding.forward(model, b).balance) for b in (padded, alone, batch)]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_outside_of_training_the_model_answers_as_ever():
    (model, binding), plain = bound("qwen3_moe", **ASKED), tiny("qwen3_moe", **ASKED)
    ids = packed_batch((5,)).input_ids
    found, expected = model(input_ids=ids, use_cache=False), plain(input_ids=ids, use_cache=False)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    assert binding.head.forward(model, packed_batch((5,))).balance is None


def test_a_model_that_asks_for_none_has_none():
    model, binding = bound("qwen3_moe")
    assert binding.balance is None
    assert binding.forward(model, packed_batch((5,))).balance is None


def test_a_router_that_does_not_say_how_many_experts_it_chooses_is_refused():
    model = tiny("qwen3_moe", **ASKED)
    # one that names it otherwise
    config: Any = SimpleNamespace(architectures=None, get_text_config=SimpleNamespace)
    model.config = config
    with pytest.raises(ConfigError, match="without a num_experts_per_tok"):
        RouterBalance.bind(model, load_balancing.eager, counter=CallCounter())


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_model_whose_own_code_makes_no_such_loss_is_refused(family):
    with pytest.raises(ConfigError, match="output_router_logits: true has no effect, because "):
        bound(family, **ASKED)
