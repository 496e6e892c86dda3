"""A checkpoint written by a thread of its own while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from omnilit.checkpoint.save import Snapshot, write_snapshot
from omnilit.errors import CheckpointError
from omnilit.logging import get_logger
from omnilit.parallel.collectives import is_distributed, raise_together, sum_over

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How a checkpoint is saved: `storage_options` of `Trainer.save_checkpoint`.

    Args:
        is_background: Copy what is saved and go on while it is written.
        keep_last: Checkpoints that stay in the folder, this one included; None for all.
    """

    is_background: bool = False
    keep_last: int | None = None


@dataclass(frozen=True, slots=True)
class _Write:
    final: Path
    future: Future[None]


class BackgroundWriter:
    """Writes at most one checkpoint at a time; every rank has one and makes the same calls.

    The threads of all ranks talk over a process group of their own: in the group that trains,
    their collectives would meet those of the next steps.

    Args:
        timeout_s: Seconds that a thread waits for those of the other ranks.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._group: ProcessGroup | None = None
        self._write: _Write | None = None

    def start(self, final: Path, snapshot: Snapshot, *, keep_last: int | None = None) -> None:
        """Begin to write `snapshot`, once the one before it is written.

        Args:
            final: See `write_snapshot`.
            snapshot: Nobody else changes its tensors.
            keep_last: See `write_snapshot`.

        Raises:
            CheckpointError: The one before failed; on every rank.
        """
        self.finish()
        if self._group is None and is_distributed():
            timeout = timedelta(seconds=self.timeout_s)
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, ProcessGroup), "every rank is in it"
            self._group = group
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        future = executor.submit(
            write_snapshot, final, snapshot, keep_last=keep_last, group=self._group
        )
        executor.shutdown(wait=False)  # the thread ends with its one piece of work
        self._write = _Write(final, future)

    def check(self, device: torch.device) -> None:
        """Find out, without waiting, whether the write that is under way has ended.

        While there is one, this is an all-reduce: a rank that raised by itself would leave the
        others hanging in their next collective.

        Args:
            device: Where the backend of the default group works.

        Raises:
            CheckpointError: It failed on some rank; on every rank.
        """
        if self._write is None:
            return
        has_ended = self._write.future.done()
        has_failed = has_ended and self._write.future.exception() is not None
        counts = sum_over({"ended": has_ended, "failed": has_failed}, device=device)
        num_ranks = dist.get_world_size() if is_distributed() else 1
        if counts["failed"] or counts["ended"] == num_ranks:
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: The write failed; on every rank.
        """
        if self._write is None:
            return
        error = _wait(self._write)
        self._write = None
        raise_together(error)

    def close(self) -> None:
        """Wait as `finish` does, but report a failure only: for the end of a run, however it came.

        It asks no other rank for anything but the rest of the write.
        """
        if self._write is not None and (error := _wait(self._write)) is not None:
            logger.error("%s", error)
        self._write = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def _wait(write: _Write) -> CheckpointError | None:
    """Why the write failed, once it has ended; None where it is good."""
    if not write.future.done():
        logger.info("waiting for %s, which is still being written", write.final)
    caught = write.future.exception()
    if caught is None:
        return None
    error = CheckpointError(f"{write.final} was not saved in the background: {caught}")
    error.__cause__ = caught
    return error
