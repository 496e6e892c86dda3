"""Exchanges of Ulysses are begun before the next projection and waited for after the last."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from omnilit.config import AcceleratorConfig
from omnilit.models.bind import bind_kernels
from omnilit.models.sequence import layout_of, split_attention
from omnilit.parallel import ulysses_async
from omnilit.parallel.sequence import split_sequence
from omnilit.testing import run_ranks
from tests.helpers.models import packed_batch, tiny
from tests.helpers.spread import cpu_kernels, topology_of

pytestmark = pytest.mark.dist
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def watch(module: nn.Module, name: str, events: list[str]) -> None:
    def forward(_: nn.Module, __: Any) -> None:
        events.append(name)

    def backward(_: nn.Module, __: Any, ___: Any) -> None:
        events.append(name)

    module.register_forward_pre_hook(forward)
    module.register_full_backward_hook(backward)


def order() -> tuple[list[str], list[str]]:
    """What one layer does, in the forward and in the backward."""
    topology = topology_of(ulysses_size=2)
    model = tiny("qwen3", num_hidden_layers=1)
    binding = bind_kernels(model, cpu_kernels())
    split_attention(model, topology, AcceleratorConfig(ulysses_size=2, enable_async=True))
    events: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(NAMES):
            watch(module, name.rpartition(".")[2], events)
    kind = ulysses_async._Exchange
    start, wait = kind.start, kind.wait

    def starting(self: Any, *args: Any) -> torch.Tensor:
        events.append("start")
        return start(self, *args)

    def waiting(self: Any) -> None:
        events.append("wait")
        wait(self)

    with mock.patch.object(kind, "start", starting), mock.patch.object(kind, "wait", waiting):
        batch = split_sequence(packed_batch((9, 5)), layout_of(topology), topology.sequence_rank)
        loss = binding.head.forward(model, batch).token_losses.sum()
        forward = events.copy()
        events.clear()
        loss.backward()
    return forward, events


def test_an_exchange_is_under_way_while_the_next_projection_is_computed(tmp_path):
    for forward, backward in run_ranks(order, 2, tmp_path=tmp_path):
        begun = ["q_proj", "start", "k_proj", "start", "v_proj", "start"]
        assert forward == [*begun, "wait", "wait", "wait", "o_proj"]
        ended = ["wait", "v_proj", "wait", "k_proj", "wait", "q_proj"]
        assert backward == ["o_proj", "start", "start", "start", *ended]
