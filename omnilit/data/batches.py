"""Collate lists of samples to micro-batches, in this process or in workers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from omnilit.data.collate import PLAIN, CollateSettings, make_batch
from omnilit.errors import DataError
from omnilit.plugins import IMPORTED, import_again
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
        "worker_init_fn": partial(_start_worker, tuple(IMPORTED)),
    }


def run_loader(loader: Iterable[T]) -> Iterator[T]:
    """What a loader yields.

    Raises:
        DataError: A worker died.
    """
    batches = iter(loader)
    reports = _hold_reports()
    while (batch := _take(batches, reports)) is not None:
        yield batch


class _DeathReports:
    """torch's handler of SIGCHLD, with its reports of dead workers held back.

    torch raises a report wherever the main thread is at: amid a step of one rank, where nothing
    tells the other ranks. Held until data is asked for, it is an error like any other of the data.

    Args:
        handler: torch's; None where there is none.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], object] | None) -> None:
        self._handler = handler
        self._is_asked = False
        self._held: RuntimeError | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        assert self._handler is not None, "not installed without one"
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            if self._is_asked or not _is_report(error):
                raise
            self._held = error

    def forget(self) -> None:
        """A new loader is not to blame for the workers of another."""
        self._held = None

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise what is held, and whatever is reported within the block."""
        self._is_asked = True
        try:
            if self._held is not None:
                raise self._held
            yield
        finally:
            self._is_asked = False


def _hold_reports() -> _DeathReports:
    """Put ourselves before torch's handler, which starting workers has installed."""
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _DeathReports):
        handler.forget()
        return handler
    reports = _DeathReports(handler if callable(handler) else None)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, reports)
    return reports


def _take(batches: Iterator[T], reports: _DeathReports) -> T | None:
    try:
        with reports.raised():
            try:
                return next(batches, None)
            except (ConnectionError, EOFError):
                # It died while handing over a tensor; torch's own report comes by signal.
                time.sleep(REPORT_S)
                raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not _is_report(error):
            raise
        raise DataError(
            problem=f"a data worker died ({' '.join(str(error).split())})",
            fix="look for a lack of memory in the system's log, or lower "
            "data.dataloader.num_workers",
        ) from error


def _is_report(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader worker")


def _start_worker(imports: tuple[str, ...], _number: int) -> None:
    import_again(imports)  # nothing to do where it was forked from this process


class _Bins(Dataset[MicroBatch]):
    def __init__(self, dataset: SampleSource, settings: CollateSettings) -> None:
        self._dataset = dataset
        self._settings = settings

    def __getitem__(self, index: list[int]) -> MicroBatch:
        return make_batch([self._dataset[i] for i in index], self._settings)


def _as_it_is(batch: T) -> T:
    return batch
