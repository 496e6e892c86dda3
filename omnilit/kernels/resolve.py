"""From the YAML's names to one frozen set of kernels, chosen before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final, cast

from omnilit.config import OpsImplementationConfig
from omnilit.config.invariance_rules import INVARIANT
from omnilit.errors import KernelError, Problem, suggest
from omnilit.kernels.batch_invariant import BACKENDS
from omnilit.kernels.machine import Machine
from omnilit.kernels.slot import Kernel
from omnilit.kernels.slots import BOUND_LATE, NPU_ALLOW_LIST, SLOTS

PRESETS: Final = ("auto", "reference", "eager", "npu")
_PRESET_KEY: Final = "model.ops_implementation.preset"
# What `auto` tries after the reference's default, in this order; then eager.
_FALLBACKS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "attn_implementation": ("sdpa",),
        "cross_entropy_loss_implementation": ("chunk_loss",),
        "moe_implementation": ("fused_npu", "torch"),
        "rms_norm_implementation": ("npu", "torch"),
        "rotary_pos_emb_implementation": ("npu",),
    }
)
_NPU: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attn_implementation": "sdpa",
        "cross_entropy_loss_implementation": "npu",
        "moe_implementation": "fused_npu",
        "rms_norm_implementation": "npu",
        "rotary_pos_emb_implementation": "npu",
        "load_balancing_loss_implementation": "triton",
    }
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of one slot.

    Args:
        backend: Its name.
        why: `given`, or how the preset came to it, for the table.
        is_given: Whether the user asked for it by name, so that having no place is an error.
        is_auto: Whether `auto` chose it, so that it may change for a model that cannot use it.
    """

    backend: str
    why: str
    is_given: bool
    is_auto: bool = False


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The backend of every slot on one machine; what runs is in `Binding`, a model at a time.

    Args:
        choices: By field of `ops_implementation`; all but those bound late can run.
        machine: What they were checked against.
        is_invariant: Whether each has to compute a row alike in any batch.
    """

    choices: Mapping[str, Choice]
    machine: Machine
    is_invariant: bool = False

    def kernel(self, field: str) -> Kernel:
        """Import the kernel chosen for `field`.

        Raises:
            KernelError: A slot that is bound late cannot run here.
        """
        backend = self.choices[field].backend
        if self.is_invariant and (problem := _invariance_problem(field, backend)):
            raise KernelError.of([problem])
        return SLOTS[field].resolve(backend, self.machine)

    def names(self) -> dict[str, str]:
        """Backend by field, as checkpoints store it."""
        return {field: choice.backend for field, choice in self.choices.items()}


def changed_fields(ops: OpsImplementationConfig) -> frozenset[str]:
    """The fields that differ from their defaults: what counts as given in plain Python."""
    return frozenset(f.name for f in fields(ops) if getattr(ops, f.name) != f.default)


def resolve_kernels(
    ops: OpsImplementationConfig,
    *,
    given: frozenset[str],
    machine: Machine,
    is_invariant: bool = False,
) -> KernelSet:
    """Choose a backend for every slot: what was given literally, the rest by the preset.

    Args:
        ops: The group of the YAML.
        given: Names of its fields that the user gave.
        machine: What training runs on.
        is_invariant: Whether each has to compute a row alike in any batch.

    Raises:
        KernelError: Something chosen cannot run here; all slots, with all reasons.
    """
    problems = check_ops(ops, given=given, machine=machine, is_invariant=is_invariant)
    if problems:
        raise KernelError.of(problems)
    choices = {field: _choose(ops, field, given, machine, is_invariant) for field in SLOTS}
    return KernelSet(MappingProxyType(choices), machine, is_invariant)


def check_ops(
    ops: OpsImplementationConfig,
    *,
    given: frozenset[str],
    machine: Machine,
    is_invariant: bool = False,
) -> list[Problem]:
    """What stands against `ops` on `machine`, without importing a kernel.

    The slots of linear attention are left to the moment a model binds them, unless their name is
    unknown: whoever trains another model need not set them.
    """
    if ops.preset not in PRESETS:
        reason = f"{ops.preset!r} is not known.{suggest(ops.preset, PRESETS)}".rstrip(".")
        return [Problem(_PRESET_KEY, reason, f"use one of {', '.join(PRESETS)}")]
    if is_invariant and machine.device == "npu":
        return [Problem(INVARIANT, "true needs a GPU or a CPU, here is an NPU", "leave it out")]
    problems = []
    for field, slot in SLOTS.items():
        backend = _choose(ops, field, given, machine, is_invariant).backend
        if field in BOUND_LATE and backend in slot:
            continue
        if is_invariant and (problem := _invariance_problem(field, backend)):
            problems.append(problem)
            continue
        if problem := _npu_problem(field, backend, machine) or slot.problem(backend, machine):
            problems.append(problem)
    return problems


def table_of_backends(machine: Machine) -> list[tuple[str, str, str]]:
    """Slot, backend, and what it lacks on `machine` (`runs here` where nothing)."""
    return [
        (slot.name, backend, "; ".join(slot.lacks(backend, machine)) or "runs here")
        for slot in SLOTS.values()
        for backend in slot
    ]


def _choose(
    ops: OpsImplementationConfig,
    field: str,
    given: frozenset[str],
    machine: Machine,
    is_invariant: bool,
) -> Choice:
    value = cast("str | None", getattr(ops, field))
    if value is None:
        return Choice("sdpa", "null: the default of transformers", is_given=False)
    if field in given:
        return Choice(value, "given", is_given=True)
    if ops.preset == "reference":
        return Choice(value, "preset reference", is_given=False)
    if ops.preset in ("eager", "npu"):
        backend = _NPU.get(field, "eager") if ops.preset == "npu" else "eager"
        return Choice(backend, f"preset {ops.preset}", is_given=False)
    return _choose_auto(field, value, machine, is_invariant=is_invariant)


def _choose_auto(field: str, default: str, machine: Machine, *, is_invariant: bool) -> Choice:
    slot = SLOTS[field]
    reasons = slot.lacks(default, machine)
    if is_invariant and default not in BACKENDS[field]:
        reasons = ("depends on the batch", *reasons)
    if not reasons and _npu_problem(field, default, machine) is None:
        return Choice(default, "reference default", is_given=False, is_auto=True)
    usable = {n for n in slot.usable(machine) if _npu_problem(field, n, machine) is None}
    usable &= set(BACKENDS[field]) if is_invariant else usable
    names = ("triton", *_FALLBACKS.get(field, ())) if is_invariant else _FALLBACKS.get(field, ())
    backend = next((name for name in names if name in usable), "eager")
    why = reasons[0] if reasons else "is not supported on NPU"  # `omnilit env` has them all
    return Choice(backend, f"{default} {why}", is_given=False, is_auto=True)


def _invariance_problem(field: str, backend: str) -> Problem | None:
    if backend in BACKENDS[field] or backend not in SLOTS[field]:
        return None
    reason = f"{backend!r} is not known to compute a row alike in any batch, as {INVARIANT} wants"
    fix = (
        f"use one of {', '.join(BACKENDS[field])}" if BACKENDS[field] else f"leave {INVARIANT} out"
    )
    return Problem(SLOTS[field].key, reason, fix)


def _npu_problem(field: str, backend: str, machine: Machine) -> Problem | None:
    """The rule of the general operations on Ascend NPU, which knows no model."""
    allowed = NPU_ALLOW_LIST.get(field)
    is_known = backend in SLOTS[field]
    if machine.device != "npu" or allowed is None or not is_known or backend in allowed:
        return None
    reason = f"{backend!r} is not supported on Ascend NPU"
    return Problem(SLOTS[field].key, reason, f"set it to one of {', '.join(allowed)}")
