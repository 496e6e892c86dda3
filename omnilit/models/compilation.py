"""torch.compile over the blocks of a model, with the code that was bound to them."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Final

import torch
from torch import nn
from torch._dynamo.utils import counters

from omnilit.errors import ConfigError, Problem, TrainingError
from omnilit.kernels.machine import Machine
from omnilit.logging import get_logger
from omnilit.models import places
from omnilit.models.attention import BOUNDARY as ATTENTION

log = get_logger(__name__)

KEY: Final = "train.enable_compile"
EXPERTS: Final = "experts get another number of tokens each time, between compiled parts"
_FIX: Final = "set train.enable_compile: false"
# Variants of one piece of code: layers that differ, training and evaluation, odd lengths. Past
# torch's 8 it would run uncompiled; a model with more than this has no block that repeats.
_RECOMPILE_LIMIT: Final = 64
_SHOWN: Final = 3


class Compilation:
    """What the compiler makes of the blocks; it compiles them when they are first called.

    Args:
        num_blocks: Blocks whose forward is compiled.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._before = _read_counts()
        self._is_reported = False

    @property
    def num_graphs(self) -> int:
        """Pieces of code compiled in this process since the blocks were made ready."""
        return _read_counts()[0] - self._before[0]

    @property
    def breaks(self) -> dict[str, int]:
        """Reasons why compiled code gives way to Python, with how often one was met."""
        _, before = self._before
        now = {reason: n - before.get(reason, 0) for reason, n in _read_counts()[1].items()}
        return {reason: n for reason, n in now.items() if n}

    def report(self) -> None:
        """Say after the first step what was compiled and what was not; later calls do nothing.

        Raises:
            TrainingError: Nothing was compiled.
        """
        if self._is_reported:
            return
        self._is_reported = True
        if not self.num_graphs:
            raise TrainingError(
                problem="train.enable_compile is on, and the compiler took no part of any block",
                fix=f"unset TORCH_COMPILE_DISABLE, or {_FIX}",
            )
        found = self.breaks
        others = {k: n for k, n in found.items() if ATTENTION not in k and EXPERTS not in k}
        log.info(
            "compile: %d blocks run as %d graphs; %d breaks at attention or experts, by design; "
            "%d others",
            self.num_blocks,
            self.num_graphs,
            sum(found.values()) - sum(others.values()),
            sum(others.values()),
        )
        for reason in sorted(others, key=lambda r: -others[r])[:_SHOWN]:
            log.warning("compile: %d breaks: %s", others[reason], _first_lines(reason))


def compile_blocks(blocks: Sequence[nn.Module], machine: Machine) -> Compilation:
    """Make every block run compiled code, at any number of tokens.

    Each gets a class of the same name whose forward is compiled. So the modules and the names of
    their parameters stay as they are, and what wraps a class's forward (recomputation, in
    transformers and on top of FSDP2's own subclass) wraps the compiled one; a forward set on the
    instance would go past it. Hooks stay outside of the compiled code.

    Args:
        blocks: From `decoder_blocks`; kernels are bound, sharding is not done yet.
        machine: Where they will run.

    Raises:
        ConfigError: There is nothing to compile, or nothing to compile it with.
    """
    if problems := compiler_problems(machine):
        raise ConfigError.of(problems)
    if not blocks:
        raise ConfigError(key=KEY, problem="the model has no repeated block to compile", fix=_FIX)
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for block in blocks:
        kind = type(block)
        if kind not in made:
            made[kind] = _compiled_class(kind)
        block.__class__ = made[kind]
        for module in block.modules():
            if places.is_experts(module):
                outside = torch.compiler.disable(_function_of(module.forward), reason=EXPERTS)
                module.forward = MethodType(outside, module)
    return Compilation(len(blocks))


def lacks_compiler(machine: Machine, environment: Mapping[str, str] = os.environ) -> str:
    """What keeps this machine from compiling, in words; empty where nothing does.

    Args:
        machine: Where the run is to be.
        environment: Where `CXX` may name a C++ compiler.
    """
    if machine.device == "npu":
        return "there is no compiler for NPUs"
    if machine.device == "cuda" and "triton" not in machine.packages:
        return "triton is not installed"
    compiler = environment.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"Python's headers are not installed ({header})"


def compiler_problems(machine: Machine) -> list[Problem]:
    """A problem with the reason of `lacks_compiler`, where there is one."""
    reason = lacks_compiler(machine)
    fix = _FIX if machine.device == "npu" else f"install it, or {_FIX}"
    return [Problem(KEY, reason, fix)] if reason else []


def _compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    forward: Callable[..., Any] = kind.forward
    # transformers wraps the forward of every subclass once more, so its own wrapper comes off
    plain: Callable[..., Any] = getattr(forward, "__wrapped__", forward)
    # Trying kernels out on the device chooses another from time to time
    is_fixed = torch.are_deterministic_algorithms_enabled()
    compiled = torch.compile(  # pyright: ignore[reportCallIssue] - torch's stub lacks the limit
        plain,
        dynamic=True,
        recompile_limit=_RECOMPILE_LIMIT,
        options={"deterministic": True} if is_fixed else None,
    )
    names = {"forward": compiled, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


def _function_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a bound method, to be bound anew: so a deepcopy binds its own module."""
    return getattr(forward, "__func__")  # noqa: B009


def _read_counts() -> tuple[int, dict[str, int]]:
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def _first_lines(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return " ".join(lines[:2])
