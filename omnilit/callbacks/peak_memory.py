"""The most memory that was in use since one last asked."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import Final

import torch

GIB: Final = 1024**3
STATUS: Final = Path("/proc/self/status")
CLEAR_REFS: Final = Path("/proc/self/clear_refs")
RESET_PEAK: Final = "5"  # proc(5): the peak of resident memory becomes what is resident now


class PeakMemory:
    """What the device's allocator held at most; on a CPU what of the process was resident.

    Where a kernel does not let the peak be reset, what is resident at the moment stands in for
    it; on macOS the peak of the whole run does.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_reset = False

    def reset(self) -> None:
        """Begin anew."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).reset_peak_memory_stats(self._device)
            return
        try:
            CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
        except OSError:  # no such file, or a container that forbids it
            self._is_reset = False
        else:
            self._is_reset = True

    def read_gib(self) -> float:
        """The peak since the last `reset`."""
        if self._device.type != "cpu":
            return torch.get_device_module(self._device).max_memory_allocated(self._device) / GIB
        if sys.platform == "darwin":  # no /proc; in bytes there
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
        name = "VmHWM" if self._is_reset else "VmRSS"
        found = re.search(
            rf"^{name}:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert found is not None, f"{STATUS} has a line {name}"
        return int(found[1]) * 1024 / GIB
