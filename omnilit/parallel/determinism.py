"""Two runs that are equal to the bit: what has to be set for it, and put back after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

HASH_SEED: Final = "PYTHONHASHSEED"
# Each is read when its library makes its first handle or communicator, so it counts if it is set
# before the process group is. What the user has set stays: that is a choice of the same kind.
ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one buffer a stream: cuBLAS takes no other way
        "NCCL_ALGO": "Ring",  # adds in one order; trees and switches need not
        "HCCL_DETERMINISTIC": "true",  # the same on Ascend
        "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers' own calls, as in vision towers
    }
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `make_deterministic` found, for `restore`.

    Args:
        environment: The variables of `ENVIRONMENT` that were set.
        is_deterministic: Whether torch insisted on deterministic algorithms.
        is_warn_only: Whether it warned only.
        cudnn: Whether cuDNN was deterministic, and whether it tried algorithms out.
    """

    environment: Mapping[str, str]
    is_deterministic: bool
    is_warn_only: bool
    cudnn: tuple[bool, bool]


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> Settings:
    """Let every operation give the same bits each time; one that cannot is an error from here on.

    Args:
        environment: Of this process, whose children inherit it.

    Returns:
        What was set before.
    """
    before = Settings(
        {name: environment[name] for name in ENVIRONMENT if name in environment},
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    )
    for name, value in ENVIRONMENT.items():
        environment.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return before


def restore(before: Settings, environment: MutableMapping[str, str] = os.environ) -> None:
    """Put back what `make_deterministic` changed."""
    for name in ENVIRONMENT.keys() - before.environment.keys():
        environment.pop(name, None)
    torch.use_deterministic_algorithms(before.is_deterministic, warn_only=before.is_warn_only)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before.cudnn


def has_fixed_hashes(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether sets of strings have the same order in every process.

    Python draws the order at its start, unless the environment then names a seed.
    """
    return environment.get(HASH_SEED, "random").isdecimal()
