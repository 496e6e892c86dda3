"""Stand-ins for the writer of a checkpoint's tensors: one waits, the disk of the other is full."""

import errno
import threading

from omnilit.checkpoint import dcp


class SlowWriter(dcp.FileSystemWriter):
    """Writes nothing before it may."""

    may_write = threading.Event()
    has_begun = threading.Event()

    def write_data(self, plan, planner):
        self.has_begun.set()
        assert self.may_write.wait(20)
        return super().write_data(plan, planner)


class FullDisk(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")
