"""What each data rank needs to go on exactly where it was: its position and random states."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from omnilit.checkpoint.stored import pack_plain, read_plain
from omnilit.errors import CheckpointError
from omnilit.logging import get_logger

logger = get_logger(__name__)
PER_RANK: Final = "per_rank"  # true in the state of a loader whose ranks each know a part


@dataclass(frozen=True, slots=True)
class DataState:
    """One data rank's entry in a checkpoint.

    Args:
        loader: State of the data loader: the same on all ranks, unless it holds PER_RANK.
        random: From `capture_random`.
    """

    loader: Mapping[str, Any]
    random: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class LoadedDataState:
    """What a data rank needs of a checkpoint.

    Args:
        loaders: States of the loaders: one where it is the same on all ranks, else all of them
            in the order of the ranks that saved them.
        random: This rank's; None when it was saved at another number of ranks.
    """

    loaders: tuple[Mapping[str, Any], ...]
    random: Mapping[str, Any] | None


def capture_random(device: torch.device) -> dict[str, Any]:
    """The random states of Python, NumPy, torch and `device`, as plain values and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries draw from it
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random(state: Mapping[str, Any], device: torch.device) -> None:
    """Set every random state to what `capture_random` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def seed_random(*, seed: int, step: int, data_rank: int) -> None:
    """Seed every random state anew from the three numbers alone."""
    mixed = zlib.crc32(f"{seed}/{step}/{data_rank}".encode())
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002
    torch.manual_seed(mixed)


def entry_name(data_rank: int) -> str:
    """The file of a data rank's entry in a checkpoint."""
    return f"data_rank_{data_rank:05d}.pt"


def pack_data_state(state: DataState, *, data_rank: int) -> bytes:
    """The content of one entry's file."""
    entry = {"loader": dict(state.loader), "random": state.random}
    return pack_plain(entry_name(data_rank), entry)


def load_data_state(
    folder: Path, *, data_rank: int, data_size: int, saved_data_size: int
) -> LoadedDataState:
    """Read what this data rank needs.

    At another number of data ranks there are no random states: `seed_random` gives new ones.

    Raises:
        CheckpointError: An entry is not there or not readable.
    """
    is_same = data_size == saved_data_size
    entry = _read_entry(folder, data_rank if is_same else 0)
    loaders = [entry["loader"]]
    if entry["loader"].get(PER_RANK):
        loaders = [_read_entry(folder, rank)["loader"] for rank in range(saved_data_size)]
    if not is_same:
        logger.info(
            "resume: saved by %d data ranks, now %d: random states start anew",
            saved_data_size,
            data_size,
        )
    return LoadedDataState(tuple(loaders), entry["random"] if is_same else None)


def _read_entry(folder: Path, data_rank: int) -> dict[str, Any]:
    path = folder / entry_name(data_rank)
    entry = read_plain(path)
    if not isinstance(entry, dict) or entry.keys() != {"loader", "random"}:
        raise CheckpointError(f"{path} is not the state of a data rank")
    return entry
