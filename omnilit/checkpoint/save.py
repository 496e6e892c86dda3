"""One checkpoint, written and read by all ranks together."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from omnilit import __version__
from omnilit.checkpoint.data_state import (
    DataState,
    LoadedDataState,
    entry_path,
    load_data_state,
    save_data_state,
)
from omnilit.checkpoint.dcp import load_tensors, save_tensors
from omnilit.checkpoint.layout import publish, stage, staging_of, step_of
from omnilit.checkpoint.manifest import Seal, seal_files
from omnilit.checkpoint.stored import read_plain, write_plain
from omnilit.checkpoint.together import FAILURES, run_together
from omnilit.errors import CheckpointError
from omnilit.parallel.collectives import is_distributed

META: Final = "meta.pt"
TENSORS: Final = "tensors"
PACKAGES: Final = ("torch", "lightning", "transformers")


@dataclass(frozen=True, slots=True)
class DataRank:
    """Which ranks read which data.

    Args:
        rank: This rank's place among those that read different data.
        size: How many of those there are.
        is_writer: True on one rank of those that share this data rank.
    """

    rank: int
    size: int
    is_writer: bool = True


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What a checkpoint holds beside the tensors that were read in place.

    Args:
        meta: As given to `save_checkpoint`, with `saved_by`: ranks and versions.
        data: This data rank's entry.
    """

    meta: dict[str, Any]
    data: LoadedDataState


def save_checkpoint(
    final: Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    meta: Mapping[str, Any],
    data: DataState,
    data_rank: DataRank,
    files: Mapping[str, str],
) -> None:
    """Write a checkpoint that appears under its name whole, or not at all; every rank calls.

    Args:
        final: `<output_dir>/checkpoints/global_step_N`, on a file system that all ranks share.
        models: By name.
        optimizers: By name, over parameters of `models`.
        meta: Plain values and tensors, the same on all ranks: step, epoch, loops, schedules, ...
        data: This rank's own.
        data_rank: Whose data that is.
        files: Text files to put beside it, by name, such as config.yaml.

    Raises:
        OmniError: Any rank failed; on every rank, with nothing left half published. See
            `run_together` for errors that are not ours.
    """
    staging = staging_of(final)
    name = "the checkpoint"
    try:
        run_together(lambda: stage(final), name=name, on_first=True)
        run_together((staging / TENSORS).mkdir, name=name, on_first=True)
        save_tensors(staging / TENSORS, models=models, optimizers=optimizers)
        full_meta = {**meta, "saved_by": _describe_run(data_rank)}
        run_together(
            lambda: _write_small_files(staging, full_meta, data, data_rank, files), name=name
        )
        own = run_together(
            lambda: seal_files(staging, _own_files(staging, data_rank, files)), name=name
        )
        seals = _gather(own or {})
        run_together(lambda: publish(staging, final, seals), name=name, on_first=True)
    except FAILURES:
        if _rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def load_checkpoint(
    folder: Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    data_rank: DataRank,
) -> LoadedCheckpoint:
    """Read a checkpoint into models and optimizers, in place; every rank calls.

    Args:
        folder: From `resolve_load_path`; may have been saved at another number of ranks.
        models: By the names they were saved under, not on the meta device.
        optimizers: By the names they were saved under.
        data_rank: Whose data this rank reads now.

    Raises:
        CheckpointError: It cannot be read, or is of another model; on every rank.
    """
    name, tensors = f"reading {folder}", folder / TENSORS
    run_together(lambda: load_tensors(tensors, models=models, optimizers=optimizers), name=name)
    loaded = run_together(lambda: _read_small_files(folder, data_rank), name=name)
    assert loaded is not None
    return loaded


def read_meta(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as meta, with `saved_by`: ranks and versions.

    Raises:
        CheckpointError: It is not there or not readable.
    """
    return read_plain(folder / META)


def saved_step(folder: Path) -> int:
    """The optimizer step after which `folder` was saved, whatever the folder is called now.

    Raises:
        CheckpointError: Neither its name nor its files say it.
    """
    named = step_of(folder.resolve())
    if named is not None:
        return named
    try:
        return int(read_meta(folder)["position"]["step"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} does not say at which step it was saved") from error


def _read_small_files(folder: Path, data_rank: DataRank) -> LoadedCheckpoint:
    meta = read_meta(folder)
    data = load_data_state(
        folder,
        data_rank=data_rank.rank,
        data_size=data_rank.size,
        saved_data_size=meta["saved_by"]["data_size"],
    )
    return LoadedCheckpoint(meta, data)


def _write_small_files(
    staging: Path,
    meta: Mapping[str, Any],
    data: DataState,
    data_rank: DataRank,
    files: Mapping[str, str],
) -> None:
    if data_rank.is_writer:
        save_data_state(staging, data, data_rank=data_rank.rank)
    if _rank() == 0:
        write_plain(staging / META, dict(meta))
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")


def _own_files(staging: Path, data_rank: DataRank, files: Mapping[str, str]) -> list[Path]:
    """What this rank wrote: each seals its own, which it surely sees and still has in memory."""
    own = list((staging / TENSORS).glob(f"__{_rank()}_*.distcp"))
    if data_rank.is_writer:
        own.append(entry_path(staging, data_rank.rank))
    if _rank() == 0:
        own += [staging / TENSORS / ".metadata", staging / META]
        own += [staging / name for name in files]
    return own


def _describe_run(data_rank: DataRank) -> dict[str, Any]:
    versions = {"omnilit": __version__, "python": platform.python_version()}
    return {
        "world_size": dist.get_world_size() if is_distributed() else 1,
        "data_size": data_rank.size,
        "versions": {**versions, **{name: version(name) for name in PACKAGES}},
    }


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def _gather(seals: dict[str, Seal]) -> dict[str, Seal]:
    """The seals of all ranks, on rank 0."""
    if not is_distributed():
        return seals
    gathered: list[dict[str, Seal]] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(seals, gathered if _rank() == 0 else None, dst=0)
    return {name: seal for part in gathered for name, seal in part.items()}
