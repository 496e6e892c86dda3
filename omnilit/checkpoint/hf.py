"""Weights as a folder that plain transformers loads, in the layout of the model's own hub files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from omnilit.checkpoint.layout import publish, stage, staging_of
from omnilit.checkpoint.manifest import files_below, seal_files
from omnilit.checkpoint.shard_files import ShardFiles, exported_tensors
from omnilit.checkpoint.whole_files import WholeFiles
from omnilit.config.ranges import EXPORT_DTYPES
from omnilit.errors import CheckpointError, ConfigError
from omnilit.models.build import build_meta


def export(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    destination: Path,
    *,
    dtype: torch.dtype,
    generation_config: GenerationConfig | None = None,
    trust_remote_code: bool = False,
    shards: ShardFiles | WholeFiles | None = None,
) -> None:
    """Write a Hugging Face folder that appears whole or not at all; rank 0 calls.

    Fused experts are split again, so that anything that reads the hub's own files reads these.

    Args:
        config: The configuration as it was read, without changes made for kernels.
        tensors: From `gather_weights`: the full values, tied ones once.
        tokenizer: Written beside the weights, with its chat template, or a processor around it.
        destination: Such as `global_step_N/hf_ckpt`; what is there is replaced.
        dtype: Of the written parameters; buffers keep their own.
        generation_config: Of the model that training started from, where it has one.
        trust_remote_code: Whether Python code beside the configuration may run.
        shards: Which tensor goes into which file; None leaves that to transformers.

    Raises:
        CheckpointError: The tensors are not all of the model, or the folder cannot be written.
    """
    model = build_meta(config, dtype=dtype, trust_remote_code=trust_remote_code)
    buffers = dict(model.named_buffers())
    cast = {n: t if n in buffers else t.to(dtype) for n, t in tensors.items()}
    _check_range(cast, dtype)
    for name, source in model.all_tied_weights_keys.items():  # a model may make its head first
        if source not in cast and name in cast:
            cast[source] = cast[name]
    missing, left_over = model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    lacking = sorted(set(missing) - model.all_tied_weights_keys.keys())
    if lacking or left_over:
        raise CheckpointError(
            f"the export needs all tensors of the model: {len(lacking)} are missing "
            f"({', '.join(lacking[:8])}), {len(left_over)} unknown ({', '.join(left_over[:8])})"
        )
    if generation_config is not None:
        model.generation_config = generation_config

    def write(folder: Path) -> None:
        if shards is None:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict={})  # all but the weights
            own, number = exported_tensors(model), model.num_parameters()
            shards.write(folder, own, num_parameters=number)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    publish_folder(destination, write)


def publish_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Let a folder appear whole or not at all.

    Args:
        destination: What is there is replaced.
        write: Writes all files into a folder that exists.

    Raises:
        CheckpointError: It cannot be written.
    """
    staging = staging_of(destination)
    try:
        stage(destination)
        write(staging)
        publish(staging, destination, seal_files(staging, files_below(staging)))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"the export to {destination} failed: {error}") from error


def _check_range(cast: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse weights that became infinite: float16 ends where the other types go on."""
    if dtype != torch.float16:
        return
    if beyond := [name for name, tensor in cast.items() if tensor.isinf().any()]:
        raise CheckpointError(
            f"float16 holds numbers up to {torch.finfo(dtype).max:.0f}, and {beyond[0]} has larger "
            "ones. To fix: export in bfloat16 or float32"
        )


def choose_export_dtype(
    name: str, *, config: PreTrainedConfig, is_loaded: bool, master: torch.dtype
) -> torch.dtype:
    """The type that `train.checkpoint.export_dtype` means.

    Args:
        name: One of `EXPORT_DTYPES`.
        config: The model's configuration as it was read.
        is_loaded: Whether training started from existing weights.
        master: The type that parameters are trained in.

    Returns:
        For `auto` the type that existing weights came in, else `master`.

    Raises:
        ConfigError: There is no such type.
    """
    if name not in EXPORT_DTYPES:
        raise ConfigError(
            key="train.checkpoint.export_dtype",
            problem=f"{name!r} is not known",
            fix=f"use one of {', '.join(EXPORT_DTYPES)}",
        )
    if name != "auto":
        return getattr(torch, name)
    own = config.dtype if is_loaded else None
    if isinstance(own, str):
        own = getattr(torch, own)
    return own or master
