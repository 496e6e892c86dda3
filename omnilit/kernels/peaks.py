"""How fast devices multiply matrices at best, as data: what `mfu` is measured against."""

from __future__ import annotations

import re
from typing import Final

from omnilit.kernels.machine import Machine

# Dense bfloat16 in TFLOP/s, by a pattern in the device's name. Those of Blackwell are its
# multiprocessors' at the clock they really reach, the others the datasheets'.
PEAK_TFLOPS: Final = (
    (r"\bG?H(100|200|800)\b", 989.0),
    (r"\bA(100|800)\b", 312.0),
    (r"\bL40S\b", 362.05),
    (r"\bL40\b", 181.05),
    (r"\bL20\b", 119.5),
    (r"\bH20\b", 148.0),
    (r"910B", 354.0),
    (r"\bGB200\b", 2565.0),
    (r"\bB200\b", 2382.0),
    (r"\bGB300\b", 2500.0),
    (r"\bB300\b", 2250.0),
)


def peak_flops(machine: Machine) -> float | None:
    """Operations a second of one device in dense bfloat16; None for one that is not listed.

    Args:
        machine: A CPU has none: its peak depends on clocks and on what else runs.
    """
    if machine.device == "cpu":
        return None
    known = (tflops for pattern, tflops in PEAK_TFLOPS if re.search(pattern, machine.name))
    tflops = next(known, None)
    return None if tflops is None else tflops * 1e12
