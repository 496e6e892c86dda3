"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from omnilit.errors import ConfigError
from omnilit.logging import get_logger

logger = get_logger(__name__)


class RunLock:
    """Holds `<output_dir>/run.lock` as long as the run lives; rank 0 takes it.

    The operating system's lock on the file is what counts: it ends with its process however that
    dies, so a lock left by a killed run is stale by itself. The process and host in the file are
    for the message. The file itself stays: removing it would race with the next run's opening.

    It is a record lock (POSIX), which belongs to the process alone: forked data workers, which
    live on for seconds after a killed run, do not hold it. For the same reason one process is not
    kept out of its own lock, and would lose it by opening and closing the file elsewhere.

    Args:
        output_dir: `train.checkpoint.output_dir`; made when it is not there.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "run.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: Another run that is alive holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # such as NFS without locks
                logger.warning("%s: this file system has no locks (%s)", self.path, error.strerror)
            else:
                os.close(descriptor)
                raise self._taken() from error
        os.ftruncate(descriptor, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        os.write(descriptor, json.dumps(owner).encode())
        self._descriptor = descriptor

    def _taken(self) -> ConfigError:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
            who = f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError):  # it is being written this moment
            who = "another process"
        return ConfigError(
            key="train.checkpoint.output_dir",
            problem=f"{self.path.parent} is in use by {who}",
            fix="wait for that run to end, or give another output_dir",
        )

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        """Take the lock for a `with` block."""
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        self.release()
