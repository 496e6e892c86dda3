"""Collate lists of samples to micro-batches, in this process or in workers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from omnilit.data.collate import PLAIN, CollateSettings, make_batch
from omnilit.data.media.load import load_media
from omnilit.data.quarantine import BadRecord
from omnilit.errors import DataError, OmniError
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


class Made(NamedTuple):
    """A micro-batch, and the records that were left out of it because they cannot be read."""

    batch: MicroBatch
    bad: tuple[BadRecord, ...] = ()


def load_batches(
    dataset: SampleSource,
    bins: Iterable[list[int]],
    *,
    workers: WorkerSettings,
    settings: CollateSettings = PLAIN,
) -> Iterator[Made]:
    """A micro-batch for each list of samples, in order; an empty list gives a filler.

    Leaves torch's random state alone, so that how often a loader is started changes nothing.
    Workers end with the iterator. An error in one is raised here.

    Raises:
        DataError: A worker died, or the media of a sample cannot be read.
    """
    loader = DataLoader(_Bins(dataset, settings), sampler=bins, **loader_arguments(workers))
    return map(raise_failed, run_loader(loader))


def raise_failed(made: T | OmniError) -> T:
    """What a worker made, or the error that it gave in its place: torch would lose its kind."""
    if isinstance(made, OmniError):
        raise made
    return made


def make_or_skip(samples: Sequence[Sample], settings: CollateSettings) -> Made:
    """The micro-batch of some samples, where that is asked for without those that are bad.

    Raises:
        DataError: The media of a sample cannot be read and it must not be left out.
    """
    try:
        return Made(make_batch(samples, settings))
    except DataError:
        if settings.media is None or not settings.is_silent:
            raise
    good, bad = [], []
    for sample in samples:
        try:
            load_media([sample], settings.media)
        except DataError as error:
            source, file, row = sample.origin
            bad.append(BadRecord.of(error, source=source, file=file, row=row))
        else:
            good.append(sample)
    return Made(make_batch(good, settings), tuple(bad))


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
    others = active_children()
    batches = iter(loader)
    workers = [child for child in active_children() if child not in others]
    reports = _hold_reports()
    try:
        while (batch := _take(batches, reports)) is not None:
            yield batch
    finally:
        if any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.kill()
                worker.join()
            reports.forget()
            reports.abandoned.append(batches)


class _WorkerDied(BaseException):
    """torch's report. An `Exception` torch would catch, and wait for locks of the dead worker."""


class _DeathReports:
    """torch's handler of SIGCHLD, with its reports of dead workers held back.

    torch raises a report wherever the main thread is at: amid a step of one rank, where nothing
    tells the other ranks. Held until data is asked for, it is an error like any other of the data.

    As torch ends a loader it waits without a limit for locks that a dead worker may hold. Loaders
    that lost one are kept from that end; when the process ends, torch passes them by.

    Args:
        handler: torch's; None where there is none.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], object] | None) -> None:
        self.abandoned: list[Iterator[object]] = []
        self._handler = handler
        self._is_asked = False
        self._held: _WorkerDied | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        assert self._handler is not None, "not installed without one"
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            if not _is_report(error):
                raise
            self._held = _WorkerDied(str(error))
            if self._is_asked:
                raise self._held from error

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
    except (_WorkerDied, RuntimeError, ConnectionError, EOFError) as error:
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


class _Bins(Dataset[Made | OmniError]):
    def __init__(self, dataset: SampleSource, settings: CollateSettings) -> None:
        self._dataset = dataset
        self._settings = settings

    def __getitem__(self, index: list[int]) -> Made | OmniError:
        try:
            return make_or_skip([self._dataset[i] for i in index], self._settings)
        except OmniError as error:
            return error


def _as_it_is(batch: T) -> T:
    return batch
