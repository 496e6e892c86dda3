"""Adapted models, and the same ones made by peft alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.config import LoraArguments, OpsImplementationConfig
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.build import build_meta
from omnilit.models.lora import (
    AdaptedModel,
    AdapterPlan,
    adapt,
    fill_adapters,
    plan_adapters,
    saved_tensors,
)
from omnilit.models.lora.plan import peft_config
from tests.helpers.models import tiny, tiny_config
from tests.helpers.spread import cpu_kernels

LORA = LoraArguments(enable=True, rank=4, alpha=12.0)


def plan_of(family: str, lora: LoraArguments = LORA) -> AdapterPlan:
    """What peft adapts of a tiny model."""
    return plan_adapters(build_meta(tiny_config(family), dtype=torch.float32), lora)


def adapted(
    family: str,
    lora: LoraArguments = LORA,
    *,
    ops: OpsImplementationConfig = OpsImplementationConfig(),
) -> tuple[PreTrainedModel, Binding, AdaptedModel]:
    """A tiny model with kernels and adapters, the latter as they start."""
    model = tiny(family)
    binding = bind_kernels(model, cpu_kernels(ops))
    bound = adapt(model, plan_of(family, lora), compute=torch.float32)
    bound.add_factors(model, torch.float32)
    fill_adapters(model, bound.plan, seed=3)
    return model, binding, bound


def disturb(model: PreTrainedModel) -> None:
    """Move what is trained off its start, where adapters add nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in saved_tensors(model).values():
            tensor.add_(torch.empty_like(tensor).uniform_(-0.1, 0.1, generator=generator))


def by_peft(
    family: str, lora: LoraArguments, plan: AdapterPlan, tensors: Mapping[str, Tensor]
) -> PeftModel:
    """The same tiny model, adapted by peft itself with the values of `tensors`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny(family), peft_config(replace(lora)))
        file = {name: tensor.detach().clone() for name, tensor in plan.to_file(tensors).items()}
        result = set_peft_model_state_dict(model, file)
    assert isinstance(model, PeftModel)
    assert not result.unexpected_keys
    return model


def peft_gradients(model: PeftModel, plan: AdapterPlan) -> dict[str, Tensor]:
    """Gradients of what peft trains, by our names of it."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.replace(".default", "").replace(".modules_to_save", "")
            found[plain] = parameter.grad
    own = {name: found[file_name] for name, file_name in plan.file_names().items()}
    assert len(found) == len(own)
    for adapter in plan.adapters:
        pair = adapter.from_file(*(own[name] for name in adapter.names))
        own.update(zip(adapter.names, pair, strict=True))
    return own
