"""How kernels are launched: what depends on sizes alone, never on the number of rows or the GPU."""

from __future__ import annotations

import triton


def fit_block(size: int) -> int:
    """The power of two that a whole row of `size` fits in."""
    return triton.next_power_of_2(size)


def count_warps(block: int) -> dict[str, int]:
    """The number of warps for a row of `block` values, as launches take it."""
    return {"num_warps": min(max(block // 512, 1), 16)}
