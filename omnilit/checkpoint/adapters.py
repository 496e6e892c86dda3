"""Adapters as a folder that `peft` loads, and merged into the model beside which they trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from omnilit.checkpoint.dcp import load_named
from omnilit.checkpoint.hf import export, publish_folder
from omnilit.checkpoint.save import TENSORS
from omnilit.checkpoint.shard_files import ShardFiles, find_shard_files
from omnilit.config.lora import LoraArguments
from omnilit.models.build import build_meta, load_generation_config
from omnilit.models.lora import AdapterPlan, plan_adapters, saved_tensors
from omnilit.models.lora.plan import peft_config
from omnilit.models.lora.values import CONFIG, WEIGHTS
from omnilit.models.weights import load_weights
from omnilit.parallel.materialize import named_tensors

CPU: Final = torch.device("cpu")


def export_adapters(
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    destination: Path,
    *,
    dtype: torch.dtype,
    base: str,
) -> None:
    """Write a folder of peft's that appears whole or not at all; rank 0 calls.

    Args:
        plan: What is adapted.
        tensors: From `gather_weights`: all that is trained, whole.
        tokenizer: Written beside, with its chat template.
        destination: What is there is replaced.
        dtype: Of what is written.
        base: Where the adapted model is, for those who load it.

    Raises:
        CheckpointError: The folder cannot be written.
    """

    def write(folder: Path) -> None:
        own = {name: t.to(dtype).contiguous() for name, t in plan.to_file(tensors).items()}
        save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
        config = peft_config(plan.arguments, base=base, is_classes=plan.is_classes)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        _sort_names(folder / CONFIG)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    publish_folder(destination, write)


def _sort_names(path: Path) -> None:
    """Put the names into one order: peft keeps them as sets, in another order in each process."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ordered = {key: sorted(v) if isinstance(v, list) else v for key, v in content.items()}
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True), encoding="utf-8")


def read_saved(meta: Mapping[str, Any]) -> tuple[LoraArguments, str] | None:
    """What a checkpoint's `meta` says of adapters: their settings, and where the model was."""
    saved = meta.get("omnilit", {}).get("lora")
    return None if saved is None else (LoraArguments(**saved["arguments"]), saved["base"])


def read_adapters(
    folder: Path,
    lora: LoraArguments,
    config: PreTrainedConfig,
    *,
    name: str,
    trust_remote_code: bool,
) -> tuple[AdapterPlan, dict[str, Tensor]]:
    """The adapters of a checkpoint, whole, in float32.

    Args:
        folder: A good checkpoint, saved at any number of ranks.
        lora: With which they were trained.
        config: Of the adapted model.
        name: Under which the model was saved.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: The model has no such adapters.
        CheckpointError: The checkpoint holds others, or cannot be read.
    """
    blueprint = build_meta(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    shapes = {known: tensor.shape for known, tensor in named_tensors(blueprint).items()}
    plan = plan_adapters(blueprint, lora)
    for adapter in plan.adapters:
        shapes.update(zip(adapter.names, adapter.shapes, strict=True))
    wanted = [*plan.trained, *(own for adapter in plan.adapters for own in adapter.names)]
    tensors = {own: torch.empty(shapes[own]) for own in wanted}
    load_named(folder / TENSORS, tensors, name=name)
    return plan, tensors


def export_merged(
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    destination: Path,
    *,
    config: PreTrainedConfig,
    base: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> None:
    """Write the model with its adapters added to its own matrices, as if it was trained whole.

    Args:
        plan: What is adapted.
        tensors: All that is trained, whole.
        tokenizer: Written beside the weights.
        destination: What is there is replaced.
        config: Of the model.
        base: Where the model's own weights are.
        dtype: Of what is written; sums are made in float32.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: The weights of the model cannot be read.
        CheckpointError: The folder cannot be written.
    """
    model = build_meta(config, dtype=dtype, trust_remote_code=trust_remote_code)
    shards: ShardFiles | None = find_shard_files(None, base, lambda: model)
    load_weights(model, config, path=base, seed=0, device=CPU, trust_remote_code=trust_remote_code)
    whole = {own: tensor.detach() for own, tensor in saved_tensors(model).items()}
    for own in plan.trained:
        whole[own] = tensors[own]
    for adapter in plan.adapters:
        own = f"{adapter.module}.{adapter.parameter or 'weight'}"
        first, second = (tensors[factor] for factor in adapter.names)
        whole[own] = adapter.add_to(whole[own].float(), first, second).to(dtype)
    export(
        config,
        whole,
        tokenizer,
        destination,
        dtype=dtype,
        generation_config=load_generation_config(base),
        trust_remote_code=trust_remote_code,
        shards=shards,
    )
