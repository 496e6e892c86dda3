"""A Hugging Face folder of a checkpoint, made without the run, its ranks or its mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from omnilit.checkpoint.dcp import load_model
from omnilit.checkpoint.hf import export
from omnilit.checkpoint.save import TENSORS, read_meta
from omnilit.checkpoint.shard_files import find_shard_files
from omnilit.errors import ConfigError
from omnilit.models.build import (
    build_meta,
    check_tokenizer,
    load_generation_config,
    load_model_config,
    load_tokenizer,
)
from omnilit.models.weights import materialize
from omnilit.parallel.materialize import named_tensors

NAME: Final = "model"  # under which a module keeps the model that it trains
ASSETS_KEY: Final = "--assets"
DTYPE_KEY: Final = "--dtype"


def export_checkpoint(
    folder: Path,
    destination: Path,
    *,
    assets: Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
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

    Returns:
        The type of the written weights.

    Raises:
        ConfigError: `assets` holds no model, or the checkpoint does not say its type.
        CheckpointError: The checkpoint is of another model, or cannot be read, or the export
            cannot be written.
    """
    target = _choose_dtype(folder, dtype)
    with _about_assets():
        config = load_model_config(str(assets), None, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(str(assets), trust_remote_code=trust_remote_code)
        check_tokenizer(tokenizer, config)
        model = build_meta(config, dtype=target, trust_remote_code=trust_remote_code)
        shards = find_shard_files(None, str(assets), lambda: model)
    materialize(model, torch.device("cpu"))
    load_model(folder / TENSORS, model, name=NAME)
    saved = model.state_dict().keys()
    export(
        config,
        {name: t.detach() for name, t in named_tensors(model).items() if name in saved},
        tokenizer,
        destination,
        dtype=target,
        generation_config=load_generation_config(str(assets)),
        trust_remote_code=trust_remote_code,
        shards=shards,
    )
    return target


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


@contextmanager
def _about_assets() -> Iterator[None]:
    """Errors in the words of a verb that has no YAML."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError.of(
            replace(
                problem,
                key=ASSETS_KEY,
                fix=problem.fix.replace("model.trust_remote_code: true", "--trust_remote_code"),
            )
            for problem in error.problems
        ) from error
