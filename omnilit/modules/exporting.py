"""What a run exports: its weights as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from omnilit.checkpoint.adapters import export_adapters
from omnilit.checkpoint.hf import export
from omnilit.checkpoint.shard_files import ShardFiles, find_shard_files
from omnilit.checkpoint.whole_files import WholeFiles, find_whole_files
from omnilit.errors import OmniError
from omnilit.models.build import build_meta, load_generation_config
from omnilit.models.lora import AdaptedModel
from omnilit.parallel.collectives import raise_together


def plan_files(
    config: PretrainedConfig,
    *,
    index_path: str | None,
    model_path: str | None,
    trust_remote_code: bool,
) -> ShardFiles | WholeFiles | None:
    """The files of all exports of a run, known before its first step.

    Where training starts from an omni model with its talker, exports have both again.

    Raises:
        ConfigError: The index that was named cannot be read, or lacks tensors of the model.
    """
    if index_path is None and (whole := find_whole_files(model_path)) is not None:
        return whole
    return find_shard_files(
        index_path,
        model_path,
        lambda: build_meta(config, dtype=torch.float32, trust_remote_code=trust_remote_code),
    )


def export_together(
    config: PretrainedConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    destination: Path,
    *,
    dtype: torch.dtype,
    model_path: str | None,
    trust_remote_code: bool,
    shards: ShardFiles | WholeFiles | None,
    adapted: AdaptedModel | None,
    is_writer: bool,
) -> None:
    """Write a Hugging Face folder on one rank and fail on all where it fails; every rank calls.

    Args:
        config: See `export`.
        tensors: See `export`.
        tokenizer: See `export`.
        destination: See `export`.
        dtype: See `export`.
        model_path: Where training started from, for its generation settings.
        trust_remote_code: See `export`.
        shards: From `plan_files`.
        adapted: The adapters that are written in place of the model, where there are any.
        is_writer: Whether this rank writes.

    Raises:
        CheckpointError: It cannot be written; on every rank.
    """
    error: BaseException | None = None
    if is_writer:
        try:
            if adapted is None:
                export(
                    config,
                    tensors,
                    tokenizer,
                    destination,
                    dtype=dtype,
                    generation_config=load_generation_config(model_path),
                    trust_remote_code=trust_remote_code,
                    shards=shards,
                )
            else:
                base = str(model_path)
                plan = adapted.plan
                export_adapters(plan, tensors, tokenizer, destination, dtype=dtype, base=base)
        except (OmniError, OSError, ValueError, TypeError, RuntimeError) as caught:
            error = caught  # also what transformers refuses to write
    raise_together(error)
