"""One checkpoint, written and read by all ranks together."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from omnilit import __version__
from omnilit.checkpoint.data_state import (
    DataState,
    LoadedDataState,
    entry_name,
    load_data_state,
    pack_data_state,
)
from omnilit.checkpoint.dcp import copy_to_cpu, load_tensors, named_state, save_tensors
from omnilit.checkpoint.layout import prune, publish, stage, staging_of, step_of
from omnilit.checkpoint.manifest import Seal, seal_files
from omnilit.checkpoint.stored import pack_plain, read_plain
from omnilit.checkpoint.together import FAILURES, run_together
from omnilit.errors import CheckpointError
from omnilit.parallel.collectives import is_distributed

META: Final = "meta.pt"
TENSORS: Final = "tensors"
NAME: Final = "the checkpoint"
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
        meta: As given to `take_snapshot`, with `saved_by`: ranks and versions.
        data: This data rank's entry.
    """

    meta: dict[str, Any]
    data: LoadedDataState


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint of one moment, ready to be written.

    Args:
        tensors: All parameters, saved buffers and moments; each rank's own part of them.
        files: The content of this rank's small files, by name.
    """

    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes]

    def copied(self) -> Snapshot:
        """One that training does not change, be it written only later."""
        return replace(self, tensors=copy_to_cpu(self.tensors))


def take_snapshot(
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    meta: Mapping[str, Any],
    data: DataState,
    data_rank: DataRank,
    files: Mapping[str, str],
) -> Snapshot:
    """What a checkpoint of this moment holds; every rank calls.

    The small files are final. The tensors are those that train: `Snapshot.copied` before they
    change.

    Args:
        models: By name.
        optimizers: By name, over parameters of `models`.
        meta: Plain values and tensors, the same on all ranks: step, epoch, loops, schedules, ...
        data: This rank's own.
        data_rank: Whose data that is.
        files: Text files to put beside it, by name, such as config.yaml.

    Raises:
        OmniError: Something cannot be saved; on every rank. See `run_together` for errors that
            are not ours.
    """

    def pack() -> dict[str, bytes]:
        packed: dict[str, bytes] = {}
        if data_rank.is_writer:
            name = entry_name(data_rank.rank)
            packed[name] = pack_data_state(data, data_rank=data_rank.rank)
        if _rank() == 0:
            packed[META] = pack_plain(META, {**meta, "saved_by": _describe_run(data_rank)})
            packed |= {name: text.encode() for name, text in files.items()}
        return packed

    packed = run_together(pack, name=NAME)
    assert packed is not None
    return Snapshot(named_state(models, optimizers), packed)


def write_snapshot(
    final: Path,
    snapshot: Snapshot,
    *,
    keep_last: int | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Write a checkpoint that appears under its name whole, or not at all; every rank calls.

    Args:
        final: `<output_dir>/checkpoints/global_step_N`, on a file system that all ranks share.
        snapshot: From `take_snapshot`.
        keep_last: Checkpoints that stay beside it in its folder, itself included; None for all.
            Older ones go once this one is complete.
        group: All ranks, for a thread beside the one that trains; default: the default group.

    Raises:
        OmniError: Any rank failed; on every rank, with nothing left half published. See
            `run_together` for errors that are not ours.
    """
    staging = staging_of(final)
    together = partial(run_together, name=NAME, group=group)
    try:
        together(lambda: stage(final), on_first=True)
        together((staging / TENSORS).mkdir, on_first=True)
        save_tensors(staging / TENSORS, snapshot.tensors, group=group)
        own = together(lambda: _write_and_seal(staging, snapshot.files))
        seals = _gather(own or {}, group)
        together(lambda: publish(staging, final, seals), on_first=True)
    except FAILURES:
        if _rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    if keep_last is not None:
        together(lambda: prune(final, keep=keep_last), on_first=True)


def load_checkpoint(
    folder: Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    data_rank: DataRank,
    stages: ProcessGroup | None = None,
) -> LoadedCheckpoint:
    """Read a checkpoint into models and optimizers, in place; every rank calls.

    Args:
        folder: From `resolve_load_path`; may have been saved at another number of ranks.
        models: By the names they were saved under, not on the meta device.
        optimizers: By the names they were saved under.
        data_rank: Whose data this rank reads now.
        stages: The ranks that hold the models' other stages, where there are any.

    Raises:
        CheckpointError: It cannot be read, or is of another model; on every rank.
    """
    name, tensors = f"reading {folder}", folder / TENSORS
    read = partial(load_tensors, tensors, models=models, optimizers=optimizers, stages=stages)
    run_together(read, name=name)
    loaded = run_together(lambda: _read_small_files(folder, data_rank), name=name)
    assert loaded is not None
    return loaded


def read_meta(folder: Path) -> dict[str, Any]:
    """What `take_snapshot` was given as meta, with `saved_by`: ranks and versions.

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


def _write_and_seal(staging: Path, files: Mapping[str, bytes]) -> dict[str, Seal]:
    """Write this rank's small files and seal all that it wrote.

    Each rank seals its own, which it surely sees and still has in memory.
    """
    for name, content in files.items():
        (staging / name).write_bytes(content)
    own = [*(staging / name for name in files), *(staging / TENSORS).glob(f"__{_rank()}_*.distcp")]
    if _rank() == 0:
        own.append(staging / TENSORS / ".metadata")
    return seal_files(staging, own)


def _describe_run(data_rank: DataRank) -> dict[str, Any]:
    versions = {"omnilit": __version__, "python": platform.python_version()}
    return {
        "world_size": dist.get_world_size() if is_distributed() else 1,
        "data_size": data_rank.size,
        "versions": {**versions, **{name: version(name) for name in PACKAGES}},
    }


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def _gather(seals: dict[str, Seal], group: ProcessGroup | None) -> dict[str, Seal]:
    """The seals of all ranks, on rank 0."""
    if not is_distributed():
        return seals
    gathered: list[dict[str, Seal]] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(seals, gathered if _rank() == 0 else None, dst=0, group=group)
    return {name: seal for part in gathered for name, seal in part.items()}
