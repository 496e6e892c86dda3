"""Recomputation changes no number in any of its forms, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.checkpoint import CheckpointError

from omnilit.config import GradientCheckpointingConfig, OpsImplementationConfig
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.bind import bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.models.recompute import enable_recomputation
from tests.helpers.models import gradients, packed_batch, tiny

OFF = GradientCheckpointingConfig(enable=False)
REENTRANT = GradientCheckpointingConfig(enable_reentrant=True)


def step(family, config):
    """Loss and gradients of one micro-batch, and how often each block computed."""
    model, batch = tiny(family), packed_batch([7, 12, 5])
    kernels = resolve_kernels(
        OpsImplementationConfig(), given=frozenset(), machine=Machine.detect("cpu")
    )
    binding = bind_kernels(model, kernels)
    enable_recomputation(model, config)
    calls = []
    for block in decoder_blocks(model):
        block.get_submodule("self_attn").register_forward_hook(lambda *_: calls.append(1))
    loss = binding.head.forward(model, batch).token_losses.sum()
    loss.backward()
    return loss.item(), gradients(model), len(calls)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma3"])
@pytest.mark.parametrize("config", [GradientCheckpointingConfig(), REENTRANT])
def test_recomputing_changes_neither_loss_nor_gradients(family, config):
    loss, expected, once = step(family, OFF)
    again, found, twice = step(family, config)
    assert again == loss
    assert (once, twice) == (2, 4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Forgetful(torch.nn.Module):
    """Computes something else when it is called again."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, hidden):
        self.calls += 1
        if self.calls > 1:
            hidden = hidden + hidden[:, :1].sin()
        return self.module(hidden)


def recompute_differently(config):
    """What is said of a block that computes something else the second time."""
    model = tiny("qwen3", num_hidden_layers=1)
    enable_recomputation(model, config)
    (block,) = decoder_blocks(model)
    block.mlp = Forgetful(block.mlp)
    loss = model(input_ids=torch.arange(4)[None], use_cache=False).logits.sum()
    with pytest.raises(CheckpointError) as caught:
        loss.backward()
    return str(caught.value)


def test_a_block_that_recomputes_differently_is_an_error():
    assert "aten.sin.default" not in recompute_differently(GradientCheckpointingConfig())


@pytest.mark.slow  # torch reads the debug symbols of its libraries
def test_debugging_says_in_which_operation_a_block_recomputes_differently():
    assert "aten.sin.default" in recompute_differently(GradientCheckpointingConfig(debug=True))


def test_debugging_is_asked_for_where_it_is_set():
    model = tiny("qwen3")
    enable_recomputation(model, GradientCheckpointingConfig(debug=True))
    blocks: list[Any] = list(decoder_blocks(model))
    options = [block._gradient_checkpointing_func.keywords for block in blocks]
    assert options == 2 * [{"use_reentrant": False, "debug": True}]


def test_a_router_loss_would_not_train_under_the_reentrant_form():
    with pytest.raises(ConfigError, match=r"enable_reentrant: the router's balance loss reads"):
        enable_recomputation(tiny("qwen3_moe", output_router_logits=True), REENTRANT)


def test_a_gradient_that_would_be_dropped_is_refused():
    model = tiny("qwen3")
    enable_recomputation(model, REENTRANT)
    (block, _) = decoder_blocks(model)
    hidden = torch.ones(1, 3, 64, requires_grad=True)
    cos = torch.ones(1, 3, 16)
    with pytest.raises(ConfigError, match=r"Layer is given position_embeddings by keyword"):
        block(hidden, position_embeddings=(cos, cos * hidden.mean()))
    with torch.no_grad():
        block(hidden, position_embeddings=(cos, cos))


def test_off_leaves_the_model_alone():
    model = tiny("qwen3")
    enable_recomputation(model, OFF)
    assert not any(block.gradient_checkpointing for block in decoder_blocks(model))


def test_a_model_without_blocks_is_refused():
    config = hf.CTRLConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, dff=16)
    with pytest.raises(ConfigError, match=r"CTRLLMHeadModel has no blocks .* set train\..*: false"):
        enable_recomputation(hf.CTRLLMHeadModel(config), GradientCheckpointingConfig())
