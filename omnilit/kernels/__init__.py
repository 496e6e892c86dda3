"""Kernel slots and their backends; nothing here knows a model."""

from omnilit.kernels.slot import OpSlot, Requirement
from omnilit.kernels.slots import (
    ATTENTION,
    CAUSAL_CONV1D,
    CROSS_ENTROPY,
    GATED_DELTA_RULE,
    LOAD_BALANCING,
    MOE,
    RMS_NORM,
    RMS_NORM_GATED,
    ROTARY,
    SLOTS,
    SWIGLU,
)

__all__ = [
    "ATTENTION",
    "CAUSAL_CONV1D",
    "CROSS_ENTROPY",
    "GATED_DELTA_RULE",
    "LOAD_BALANCING",
    "MOE",
    "RMS_NORM",
    "RMS_NORM_GATED",
    "ROTARY",
    "SLOTS",
    "SWIGLU",
    "OpSlot",
    "Requirement",
]
