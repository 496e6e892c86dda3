"""What each data rank needs to go on exactly where it was: its position and random states."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnilit.checkpoint.stored import read_plain, write_plain
from omnilit.errors import CheckpointError
from omnilit.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DataState:
    """One data rank's entry in a checkpoint.

    Args:
        loader: Position of the data loader, the same on all ranks.
        random: From `capture_random`; None when it was saved at another number of ranks.
    """

    loader: Mapping[str, Any]
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


def entry_path(folder: Path, data_rank: int) -> Path:
    """Where a data rank's entry lies in a checkpoint."""
    return folder / f"data_rank_{data_rank:05d}.pt"


def save_data_state(folder: Path, state: DataState, *, data_rank: int) -> Path:
    """Write one entry and return its path."""
    path = entry_path(folder, data_rank)
    write_plain(path, {"loader": dict(state.loader), "random": state.random})
    return path


def load_data_state(
    folder: Path, *, data_rank: int, data_size: int, saved_data_size: int
) -> DataState:
    """Read this data rank's entry.

    At another number of data ranks the position comes from the first entry, as it is the same on
    all, and there are no random states: `seed_random` gives new ones.

    Raises:
        CheckpointError: The entry is not there or not readable.
    """
    is_same = data_size == saved_data_size
    path = entry_path(folder, data_rank if is_same else 0)
    entry = read_plain(path)
    if not isinstance(entry, dict) or entry.keys() != {"loader", "random"}:
        raise CheckpointError(f"{path} is not the state of a data rank")
    if not is_same:
        logger.info(
            "resume: saved by %d data ranks, now %d: random states start anew",
            saved_data_size,
            data_size,
        )
    return DataState(loader=entry["loader"], random=entry["random"] if is_same else None)
