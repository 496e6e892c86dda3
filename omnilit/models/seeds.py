"""Random states that depend on a run's seed and on a name, and on nothing else."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, name: str) -> int:
    """What the random numbers of one module start from.

    Args:
        seed: `train.seed`.
        name: Of the module.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # generators take 63 bits on every platform
