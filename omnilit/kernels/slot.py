"""Kernel slots: named operations whose implementation is chosen in the YAML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final, Literal

from omnilit.errors import KernelError, Problem, suggest
from omnilit.kernels.machine import Machine

Kernel = Callable[..., Any]  # each slot documents its own signature, in its eager reference
_STAND_INS: Final = MappingProxyType({"triton": "triton-ascend"})  # the same module, for Ascend


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a backend needs from the machine.

    Args:
        device: Device type, `accelerator` for any but a CPU, or `any`.
        min_sm: Lowest CUDA compute capability, as major * 10 + minor; asked of CUDA alone where
            the device may be any.
        max_sm: Highest one, likewise.
        packages: Distributions that must be installed.
    """

    device: Literal["any", "accelerator", "cpu", "cuda", "npu"] = "any"
    min_sm: int | None = None
    max_sm: int | None = None
    packages: tuple[str, ...] = ()

    def unmet(self, machine: Machine) -> tuple[str, ...]:
        """Every reason why `machine` does not do; empty where it does."""
        reasons = []
        kind = "cpu" if machine.device == "cpu" else "accelerator"
        if self.device not in ("any", kind, machine.device):
            wanted = "cuda or npu" if self.device == "accelerator" else self.device
            reasons.append(f"needs {wanted}, this machine trains on {machine.device}")
        if self.device == "cuda" or machine.device == "cuda":
            reasons += self._unmet_sm(machine.sm)
        missing = [
            name
            for name in self.packages
            if not {name, _STAND_INS.get(name)} & set(machine.packages)
        ]
        reasons += [f"package {name} is not installed" for name in missing]
        return tuple(reasons)

    def _unmet_sm(self, sm: int | None) -> list[str]:
        reasons = []
        has = "none" if sm is None else str(sm)
        if self.min_sm is not None and (sm is None or sm < self.min_sm):
            reasons.append(f"needs SM {self.min_sm} or newer, here is {has}")
        if self.max_sm is not None and (sm is None or sm > self.max_sm):
            reasons.append(f"needs SM {self.max_sm} or older, here is {has}")
        return reasons


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of a slot.

    Args:
        target: `package.module:attribute`, imported when resolved; None where the name is
            reserved and its implementation is not available yet.
        needs: What the machine must offer.
    """

    target: str | None
    needs: Requirement

    def lacks(self, machine: Machine) -> tuple[str, ...]:
        """Every reason why this cannot run on `machine`, that it is not available yet included."""
        later = () if self.target is not None else ("is not available yet",)
        return self.needs.unmet(machine) + later


class OpSlot:
    """A named operation with interchangeable backends, of which `eager` always exists.

    Args:
        name: Short name for tables, such as `rms_norm`.
        key: YAML path of the field that chooses the backend.
        eager: Target of the reference implementation, the oracle of all other backends.
    """

    def __init__(self, name: str, *, key: str, eager: str) -> None:
        self.name, self.key = name, key
        self._backends = {"eager": Backend(eager, Requirement())}

    def __iter__(self) -> Iterator[str]:
        """Names of all backends, in order of registration."""
        return iter(self._backends)

    def register(self, backend: str, target: str | None, needs: Requirement | None = None) -> None:
        """Add a backend; the same again does nothing.

        Raises:
            KernelError: The name already stands for something else.
        """
        new = Backend(target, needs or Requirement())
        if self._backends.setdefault(backend, new) != new:
            raise KernelError(
                key=self.key,
                problem=f"{backend!r} is already registered for {self._backends[backend].target}",
                fix="register it under another name",
            )

    def lacks(self, backend: str, machine: Machine) -> tuple[str, ...]:
        """Why the registered `backend` cannot run on `machine`; empty where it can."""
        return self._backends[backend].lacks(machine)

    def usable(self, machine: Machine) -> list[str]:
        """Names of the backends that `machine` can run."""
        return [name for name in self if not self.lacks(name, machine)]

    def problem(self, backend: str, machine: Machine) -> Problem | None:
        """What stands against `backend` on `machine`, or None; imports nothing."""
        if backend not in self._backends:
            reason = f"{backend!r} is not known, there are {', '.join(self)}."
            reason = (reason + suggest(backend, self)).rstrip(".")
        elif reasons := self.lacks(backend, machine):
            reason = f"{backend!r} cannot run here: {'; '.join(reasons)}"
        else:
            return None
        return Problem(self.key, reason, f"use one of {', '.join(self.usable(machine))}")

    def resolve(self, backend: str, machine: Machine) -> Kernel:
        """Import and return what `backend` stands for.

        Raises:
            KernelError: Unknown, or this machine cannot run it; with every reason.
        """
        if problem := self.problem(backend, machine):
            raise KernelError.of([problem])
        module, _, attribute = str(self._backends[backend].target).partition(":")
        return getattr(import_module(module), attribute)
