from __future__ import annotations

import importlib
from dataclasses import fields

import pytest

from omnilit.config import OpsImplementationConfig
from omnilit.errors import KernelError
from omnilit.kernels import swiglu
from omnilit.kernels.machine import Machine
from omnilit.kernels.slot import OpSlot, Requirement
from omnilit.kernels.slots import BOUND_LATE, NPU_ALLOW_LIST, SLOTS

CPU = Machine("cpu")
HOPPER = Machine("cuda", sm=90, packages={"triton": "3"})


def new_slot() -> OpSlot:
    return OpSlot("glu", key="model.ops.glu", eager="omnilit.kernels.swiglu:eager")


def test_a_requirement_names_everything_that_is_missing():
    needs = Requirement("cuda", min_sm=80, max_sm=90, packages=("flash-attn", "triton"))
    assert needs.unmet(CPU) == (
        "needs cuda, this machine trains on cpu",
        "needs SM 80 or newer, here is none",
        "needs SM 90 or older, here is none",
        "package flash-attn is not installed",
        "package triton is not installed",
    )
    assert needs.unmet(HOPPER) == ("package flash-attn is not installed",)
    assert Requirement("cuda", min_sm=80).unmet(Machine("cuda", sm=75)) == (
        "needs SM 80 or newer, here is 75",
    )
    assert Requirement("cuda", max_sm=90).unmet(Machine("cuda", sm=100)) == (
        "needs SM 90 or older, here is 100",
    )
    assert Requirement().unmet(CPU) == ()


def test_a_compute_capability_is_asked_of_cuda_alone_where_any_device_does():
    needs = Requirement(min_sm=80)
    assert needs.unmet(CPU) == needs.unmet(Machine("npu")) == needs.unmet(HOPPER) == ()
    assert needs.unmet(Machine("cuda", sm=75)) == ("needs SM 80 or newer, here is 75",)


def test_a_target_is_imported_when_resolved():
    slot = new_slot()
    slot.register("broken", "no_such_package.at_all:f")
    assert slot.resolve("eager", CPU) is swiglu.eager
    with pytest.raises(ModuleNotFoundError):
        slot.resolve("broken", CPU)


def test_what_cannot_run_is_refused_with_every_reason():
    slot = new_slot()
    slot.register("fast", "no_such_package:f", Requirement("cuda", packages=("fast-glu",)))
    with pytest.raises(KernelError) as error:
        slot.resolve("fast", CPU)
    assert str(error.value) == (
        "model.ops.glu: 'fast' cannot run here: needs cuda, this machine trains on cpu; package "
        "fast-glu is not installed. To fix: use one of eager."
    )


def test_a_reserved_name_says_that_it_is_not_available_yet():
    slot = new_slot()
    slot.register("later", None, Requirement("cuda"))
    with pytest.raises(KernelError, match="'later' cannot run here: is not available yet"):
        slot.resolve("later", HOPPER)
    assert slot.usable(HOPPER) == ["eager"]


def test_an_unknown_name_lists_what_exists():
    slot = new_slot()
    slot.register("liger_kernel", "x:y", Requirement("cuda"))
    with pytest.raises(KernelError) as error:
        slot.resolve("liger_kernal", CPU)
    assert str(error.value) == (
        "model.ops.glu: 'liger_kernal' is not known, there are eager, liger_kernel. Did you mean "
        "'liger_kernel'? To fix: use one of eager."
    )
    with pytest.raises(KernelError, match="'native-sparse' is not known, there are eager, sdpa"):
        SLOTS["attn_implementation"].resolve("native-sparse", HOPPER)


def test_registering_twice_is_harmless_unless_the_target_differs():
    slot = new_slot()
    slot.register("mine", "a:b")
    slot.register("mine", "a:b")
    with pytest.raises(KernelError, match="'mine' is already registered for a:b"):
        slot.register("mine", "a:c")
    with pytest.raises(KernelError, match="'eager' is already registered"):
        slot.register("eager", "a:c")


def test_there_is_a_slot_a_field_and_its_default_is_registered():
    ops = {f.name: f.default for f in fields(OpsImplementationConfig) if f.name != "preset"}
    assert ops.keys() == SLOTS.keys()
    assert all(str(default) in SLOTS[field] for field, default in ops.items())
    assert all(slot.key == f"model.ops_implementation.{field}" for field, slot in SLOTS.items())
    assert SLOTS.keys() > BOUND_LATE
    assert all(name in SLOTS[f] for f, allowed in NPU_ALLOW_LIST.items() for name in allowed)


@pytest.mark.parametrize("field", list(SLOTS))
def test_the_reference_of_every_slot_exists(field):
    assert callable(SLOTS[field].resolve("eager", CPU))


def test_every_target_of_ours_exists_without_its_package():
    for slot in SLOTS.values():
        for backend in slot._backends.values():
            if backend.target is not None:
                module, _, attribute = backend.target.partition(":")
                assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("field", list(SLOTS))
def test_gpu_backends_are_refused_on_a_cpu(field):
    slot = SLOTS[field]
    allowed = {"eager", "sdpa", "chunk_loss", "torch", "grouped_mm"}
    assert set(slot.usable(CPU)) <= allowed
    for backend in set(slot) - allowed:
        with pytest.raises(KernelError, match="cannot run here"):
            slot.resolve(backend, CPU)


def test_an_accelerator_is_any_device_but_a_cpu():
    needs = Requirement("accelerator", packages=("triton",))
    ascend = Machine("npu", packages={"triton-ascend": "3"})  # brings the module triton too
    assert needs.unmet(HOPPER) == needs.unmet(ascend) == ()
    assert needs.unmet(CPU) == (
        "needs cuda or npu, this machine trains on cpu",
        "package triton is not installed",
    )
