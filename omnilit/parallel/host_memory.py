"""Host memory of a run whose tensors live there: freed blocks are kept for the next step."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # from glibc's malloc.h
M_MMAP_THRESHOLD: Final = -3
OWN_BLOCKS: Final = 2**26  # bytes from which a block is given back on its own as soon as it is free
KEPT_AT_THE_END: Final = 2**30  # bytes of freed memory that the process keeps for what comes
SETTINGS: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_blocks() -> bool:
    """Have glibc reuse freed blocks of megabytes in place of returning them to the kernel.

    By default it returns them, and each step then takes its activations from the kernel again,
    page by page, zeroed: a sixth of a step's CPU time. What the environment says about it stays.

    Returns:
        Whether it was set: not with another C library, nor where the environment chooses.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(M_MMAP_THRESHOLD, OWN_BLOCKS) and mallopt(M_TRIM_THRESHOLD, KEPT_AT_THE_END)
    )
