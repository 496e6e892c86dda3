"""What fla's kernels need of a machine without a GPU to run under Triton's interpreter.

Import it before anything that imports triton or fla, in a process of its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLA_CACHE_RESULTS", "0")
os.environ.setdefault("FLA_USE_TILELANG", "0")

import builtins
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

import tests.helpers.interpreted  # noqa: F401 - before anything that imports triton

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that there is no GPU, which fla asks once, at import
    for _name in ("modules.convolution", "modules.fused_norm_gate", "ops.gated_delta_rule"):
        importlib.import_module(f"fla.{_name}")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

PROPERTIES = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 1,
    "warpSize": 32,
    "max_num_regs": 65536,
}


class NoDriver:
    """Stands in for the driver that the tuner asks; one try of each kernel takes a second here."""

    utils = SimpleNamespace(get_device_properties=lambda _: PROPERTIES)

    def get_current_target(self) -> GPUTarget:
        """An Ampere GPU."""
        return GPUTarget("cuda", 80, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, _: object = None) -> int:
        """There is one."""
        return 0

    def get_device_interface(self) -> SimpleNamespace:
        """Nothing runs beside the process."""
        return SimpleNamespace(synchronize=lambda *_: None, current_device=lambda: 0)

    def get_benchmarker(self) -> Callable[..., Any]:
        """The first of the kernels to choose from wins."""
        return lambda *_, quantiles=None, **__: [1.0] * len(quantiles or [0])


def count_in_tensors() -> None:
    """Let loops in kernels count in tensors, as compiled ones do: some cast their index."""

    def count(*ends: Any) -> Iterator[Any]:
        whole = [int(e.handle.data.item()) if hasattr(e, "handle") else int(e) for e in ends]
        for number in builtins.range(*whole):
            yield interpreter._implicit_cvt(number)

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops") and getattr(module, "__file__", None):
            source = inspect.getsource(module)
            if "@triton.jit" in source and "in range(" in source:
                module.range = count  # type: ignore[attr-defined]


triton.runtime.driver.set_active(NoDriver())  # pyright: ignore[reportArgumentType]
count_in_tensors()
