"""Which dtype is stored, which computes and which reduces, as the configuration says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from omnilit.config import MixedPrecisionConfig
from omnilit.kernels.machine import Machine


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of one model.

    Args:
        master: Of parameters and moments.
        compute: Of gathered parameters and activations.
        policy: The same for FSDP2.
    """

    master: torch.dtype
    compute: torch.dtype
    policy: MixedPrecisionPolicy

    @classmethod
    def of(cls, config: MixedPrecisionConfig, machine: Machine) -> Precision:
        """Read the configuration; `param_dtype: auto` is bfloat16 where it pays, else master.

        With mixed precision off everything is in `master_dtype`.
        """
        master = _dtype(config.master_dtype)
        if not config.enable:
            return cls(master, master, MixedPrecisionPolicy())
        if config.param_dtype == "auto":
            compute = torch.bfloat16 if machine.has_fast_bf16 else master
        else:
            compute = _dtype(config.param_dtype)
        policy = MixedPrecisionPolicy(
            param_dtype=compute,
            reduce_dtype=_dtype(config.reduce_dtype),
            output_dtype=_dtype(config.output_dtype) if config.output_dtype else None,
            cast_forward_inputs=config.cast_forward_inputs,
        )
        return cls(master, compute, policy)

    def __str__(self) -> str:
        """For the log: what computes and what is stored."""
        return f"computes in {_name(self.compute)}, stores {_name(self.master)}"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
