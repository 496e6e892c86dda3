"""What is known of a split model before there are ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import Choice, resolve_kernels
from omnilit.models.build import build_meta
from omnilit.models.head import FIELD
from omnilit.models.tensor_parallel import fit_kernels, split_model
from tests.helpers.models import tiny_config

KEY = "train.accelerator.tp_size"


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def kernels(choice: Choice):
    found = resolve_kernels(OpsImplementationConfig(), given=frozenset(), machine=Machine("cpu"))
    return replace(found, choices=MappingProxyType({**found.choices, FIELD: choice}))


def test_a_head_that_was_not_asked_for_gives_way_and_says_why():
    chosen = kernels(Choice("eager", "preset eager", is_given=False))
    assert fit_kernels(chosen, tp_size=1, is_compiled=True) is chosen
    choice = fit_kernels(chosen, tp_size=2, is_compiled=False).choices[FIELD]
    assert choice.backend == "chunk_loss"
    assert choice.why == "eager needs the whole vocabulary, which tp_size splits"


def test_a_head_that_was_asked_for_and_compiling_are_refused():
    given = kernels(Choice("eager", "given", is_given=True))
    with pytest.raises(ConfigError, match="'eager' needs the whole vocabulary"):
        fit_kernels(given, tp_size=2, is_compiled=False)
    with pytest.raises(ConfigError, match="torch cannot compile split matrices"):
        fit_kernels(given, tp_size=2, is_compiled=True)


@pytest.mark.parametrize(
    ("family", "over", "message"),
    [
        ("qwen3", {"vocab_size": 254}, "4 ranks cannot split the vocabulary of 254 tokens evenly"),
        ("llama", {"intermediate_size": 98},
         r"4 ranks cannot split dimension 0 of gate_proj.weight \(98 entries\) evenly"),
        ("qwen3_moe", {"moe_intermediate_size": 30},
         (r"4 ranks cannot split dimension 1 of experts.gate_up_proj \(60 entries, 2 matrices\) "
          "evenly")),
        ("gpt_oss", {"intermediate_size": 30},
         r"4 ranks cannot split dimension 1 of experts.down_proj \(30 entries\) evenly"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_evenly_is_refused(
    family: str, over: dict[str, Any], message: str, mesh: DeviceMesh
):
    model = build_meta(tiny_config(family, **over), dtype=torch.float32)
    with pytest.raises(ConfigError, match=f"{KEY}: {message}"):
        split_model(model, mesh)


def test_embeddings_of_another_kind_are_refused(mesh: DeviceMesh):
    model = build_meta(tiny_config("llama"), dtype=torch.float32)
    model.set_input_embeddings(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="the input embeddings of LlamaForCausalLM are Linear"):
        split_model(model, mesh)


def test_joined_matrices_whose_rows_fsdp2_would_shard_too_are_refused(mesh: DeviceMesh):
    model = build_meta(tiny_config("phi3"), dtype=torch.float32)
    model.tp_plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise"}
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.gate_up_proj\.weight holds 2 matrices"):
        split_model(model, mesh)


def test_experts_can_be_left_to_expert_parallelism(mesh: DeviceMesh):
    model = build_meta(tiny_config("gpt_oss", num_key_value_heads=4), dtype=torch.float32)
    before = {name: module.forward for name, module in model.named_modules() if "experts" in name}
    split_model(model, mesh, with_experts=False)
    whole = {type(p) for n, p in model.named_parameters() if "experts" in n}
    assert whole == {nn.Parameter}
    assert {name: model.get_submodule(name).forward for name in before} == before
    assert model.model.layers[0].self_attn.sinks.placements[0].dim == 0
