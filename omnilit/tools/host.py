"""The device that a verb without a `trainer` group runs on."""

from __future__ import annotations

from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine


def best_machine() -> Machine:
    """This machine with its GPU where torch finds one, else with its CPU."""
    try:
        return Machine.detect("cuda")
    except ConfigError:  # no GPU is a normal answer here
        return Machine.detect("cpu")
