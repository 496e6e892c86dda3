"""A Hugging Face folder of a checkpoint, made without the run, its ranks or its mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from omnilit.checkpoint.adapters import (
    export_adapters,
    export_merged,
    read_adapters,
    read_saved,
)
from omnilit.checkpoint.dcp import load_model
from omnilit.checkpoint.hf import choose_export_dtype, export
from omnilit.checkpoint.save import TENSORS, read_meta
from omnilit.checkpoint.shard_files import find_shard_files
from omnilit.checkpoint.whole_files import find_whole_files
from omnilit.config.lora import LoraArguments
from omnilit.data.media.processor import find_processor
from omnilit.errors import ConfigError
from omnilit.models.architecture import part_of_whole, takes_media
from omnilit.models.build import (
    build_meta,
    check_tokenizer,
    load_generation_config,
    load_model_config,
    load_tokenizer,
)
from omnilit.models.lora import AdapterPlan, saved_tensors
from omnilit.models.weights import materialize

NAME: Final = "model"  # under which a module keeps the model that it trains
ASSETS_KEY: Final = "--assets"
DTYPE_KEY: Final = "--dtype"
MERGE_KEY: Final = "--merge"
BASE_KEY: Final = "--base"


def export_checkpoint(
    folder: Path,
    destination: Path,
    *,
    assets: Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    is_merged: bool = False,
    base: Path | None = None,
) -> torch.dtype:
    """Write what the run itself would have exported at a checkpoint's step, on one process.

    The weights are read straight into the type that is written, so that they are in memory once
    and the optimizer's moments never.

    Args:
        folder: A good checkpoint, saved at any number of ranks.
        destination: See `export`.
        assets: A folder with the model's configuration, its tokenizer and, where it has one, its
            generation configuration: a run's `model_assets`, or the model that it started from.
        dtype: One of `EXPORT_DTYPES`; `auto` is the run's own `train.checkpoint.export_dtype`.
        trust_remote_code: Whether Python code in `assets` may run.
        is_merged: Of adapters: write the whole model, with them added to its matrices.
        base: Where the adapted model is; default: where it was in training.

    Returns:
        The type of the written weights.

    Raises:
        ConfigError: `assets` holds no model, the checkpoint does not say its type, or it holds no
            adapters that could be merged.
        CheckpointError: The checkpoint is of another model, or cannot be read, or the export
            cannot be written.
    """
    saved = read_saved(read_meta(folder))
    target = _choose_dtype(folder, dtype)
    if saved is None and (is_merged or base is not None):
        flag = MERGE_KEY if is_merged else BASE_KEY
        problem = f"{folder} holds a whole model and no adapters"
        raise ConfigError(key=flag, problem=problem, fix="leave it out")
    own = _Writing.of(assets, destination, trust_remote_code=trust_remote_code)
    if saved is None:
        _export_whole(folder, own, assets=assets, dtype=target)
        return target
    lora, trained_beside = saved
    beside = trained_beside if base is None else str(base)
    if not is_merged:
        plan, tensors = own.read_adapters(folder, lora)
        export_adapters(plan, tensors, own.tokenizer, destination, dtype=target, base=beside)
        return target
    if dtype == "auto":  # as if the model had been trained whole
        target = choose_export_dtype(dtype, config=own.config, is_loaded=True, master=torch.float32)
    plan, tensors = own.read_adapters(folder, lora)
    with _about(BASE_KEY, "name the model that the adapters were trained beside"):
        export_merged(
            plan,
            tensors,
            own.tokenizer,
            destination,
            config=own.config,
            base=beside,
            dtype=target,
            trust_remote_code=trust_remote_code,
        )
    return target


@dataclass(frozen=True, slots=True)
class _Writing:
    """What every export of a model needs."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    destination: Path
    trust_remote_code: bool

    @classmethod
    def of(cls, assets: Path, destination: Path, *, trust_remote_code: bool) -> _Writing:
        """From what lies beside a model; of one that sees its processor, too."""
        path = str(assets)
        with _about_assets():
            read = load_model_config(path, None, trust_remote_code=trust_remote_code)
            config = part_of_whole(read)
            tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
            check_tokenizer(tokenizer, config)
            processor = None
            if takes_media(config):
                processor = find_processor(path, trust_remote_code=trust_remote_code)
        return cls(config, processor or tokenizer, destination, trust_remote_code)

    def read_adapters(
        self, folder: Path, lora: LoraArguments
    ) -> tuple[AdapterPlan, dict[str, Tensor]]:
        return read_adapters(
            folder, lora, self.config, name=NAME, trust_remote_code=self.trust_remote_code
        )


def _export_whole(folder: Path, own: _Writing, *, assets: Path, dtype: torch.dtype) -> None:
    with _about_assets():
        model = build_meta(own.config, dtype=dtype, trust_remote_code=own.trust_remote_code)
        whole = find_whole_files(str(assets))
        shards = whole or find_shard_files(None, str(assets), lambda: model)
    materialize(model, torch.device("cpu"))
    load_model(folder / TENSORS, model, name=NAME)
    export(
        own.config,
        {name: tensor.detach() for name, tensor in saved_tensors(model).items()},
        own.tokenizer,
        own.destination,
        dtype=dtype,
        generation_config=load_generation_config(str(assets)),
        trust_remote_code=own.trust_remote_code,
        shards=shards,
    )


def _choose_dtype(folder: Path, name: str) -> torch.dtype:
    if name == "auto":
        name = read_meta(folder).get("omnilit", {}).get("export_dtype", "")
        if not name:
            raise ConfigError(
                key=DTYPE_KEY,
                problem=f"{folder} does not say in which type its run exports",
                fix=f"give {DTYPE_KEY} float32 or another one",
            )
    return getattr(torch, name)


def _about_assets() -> AbstractContextManager[None]:
    return _about(ASSETS_KEY, None)


@contextmanager
def _about(key: str, fix: str | None) -> Iterator[None]:
    """Errors in the words of a verb that has no YAML."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError.of(
            replace(
                problem,
                key=key,
                fix=fix
                or problem.fix.replace("model.trust_remote_code: true", "--trust_remote_code"),
            )
            for problem in error.problems
        ) from error
