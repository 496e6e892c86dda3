"""Collate lists of samples to micro-batches, in this process or in workers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from omnilit.data.collate import PLAIN, CollateSettings, collate, filler
from omnilit.errors import DataError
from omnilit.types import MicroBatch, Sample

T = TypeVar("T")
REPORT_S = 2.0


class SampleSource(Protocol):
    """Samples by index, and how long each is without reading it."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample, [n]."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index`."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The processes that collate.

    Args:
        num_workers: 0 collates in the training process.
        prefetch_factor: Micro-batches that each worker makes ahead.
        pin_memory: Put them into page-locked memory.
    """

    num_workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool = False


def load_batches(
    dataset: SampleSource,
    bins: Iterable[list[int]],
    *,
    workers: WorkerSettings,
    settings: CollateSettings = PLAIN,
) -> Iterator[MicroBatch]:
    """A micro-batch for each list of samples, in order; an empty list gives a filler.

    Leaves torch's random state alone, so that how often a loader is started changes nothing.
    Workers end with the iterator. An error in one is raised here.

    Raises:
        DataError: A worker died.
    """
    return run_loader(
        DataLoader(
            _Bins(dataset, settings),
            sampler=bins,
            **loader_arguments(workers),
        )
    )


def loader_arguments(workers: WorkerSettings) -> dict[str, Any]:
    """How a torch loader runs whose data set makes whole micro-batches."""
    return {
        "batch_size": None,
        "collate_fn": _as_it_is,
        "num_workers": workers.num_workers,
        "prefetch_factor": workers.prefetch_factor if workers.num_workers else None,
        "pin_memory": workers.pin_memory,
        "generator": torch.Generator(),
    }


def run_loader(loader: Iterable[T]) -> Iterator[T]:
    """What a loader yields.

    Raises:
        DataError: A worker died.
    """
    batches = iter(loader)
    while (batch := _take(batches)) is not None:
        yield batch


def _take(batches: Iterator[T]) -> T | None:
    try:
        try:
            return next(batches, None)
        except (ConnectionError, EOFError):
            # It died while handing over a tensor; torch's own report comes by signal.
            time.sleep(REPORT_S)
            raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            problem=f"a data worker died ({' '.join(str(error).split())})",
            fix="look for a lack of memory in the system's log, or lower "
            "data.dataloader.num_workers",
        ) from error


class _Bins(Dataset[MicroBatch]):
    def __init__(self, dataset: SampleSource, settings: CollateSettings) -> None:
        self._dataset = dataset
        self._settings = settings

    def __getitem__(self, index: list[int]) -> MicroBatch:
        if not index:
            return filler(self._settings)
        return collate([self._dataset[i] for i in index], self._settings)


def _as_it_is(batch: T) -> T:
    return batch
