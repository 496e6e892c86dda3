from __future__ import annotations

import pytest

from omnilit.config import OpsImplementationConfig
from omnilit.errors import KernelError
from omnilit.kernels.cross_entropy import chunk_loss
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import (
    KernelSet,
    changed_fields,
    check_ops,
    resolve_kernels,
    table_of_backends,
)
from omnilit.kernels.slots import BOUND_LATE, SLOTS

ALL = {"liger-kernel": "0.8", "triton": "3.9", "flash-attn": "2.8", "flash-linear-attention": "0.6"}
CPU = Machine("cpu")
AMPERE = Machine("cuda", sm=80, packages=ALL)
TURING = Machine("cuda", sm=75, packages=ALL)
BARE_HOPPER = Machine("cuda", sm=90)
NPU = Machine("npu", packages={"torch-npu": "2.13", "triton": "3.9"})


def resolved(machine: Machine, **fields: str | None) -> KernelSet:
    ops = OpsImplementationConfig(**fields)  # type: ignore[arg-type]
    return resolve_kernels(ops, given=changed_fields(ops), machine=machine)


def test_auto_takes_the_best_that_a_cpu_can():
    kernels = resolved(CPU)
    names = kernels.names()
    assert names.pop("attn_implementation") == "sdpa"
    assert names.pop("cross_entropy_loss_implementation") == "chunk_loss"
    assert names.pop("rms_norm_implementation") == "torch"
    assert names.pop("moe_implementation") == "torch"
    assert set(names.values()) == {"eager"}
    assert len(names) == 6
    assert kernels.kernel("cross_entropy_loss_implementation") is chunk_loss


def test_auto_takes_the_defaults_where_they_run():
    names = resolved(AMPERE).names()
    assert names["attn_implementation"] == "flash_attention_2"
    for field in ("cross_entropy_loss", "rms_norm", "swiglu_mlp", "rotary_pos_emb"):
        assert names[f"{field}_implementation"] == "liger_kernel"


def test_auto_says_what_a_default_lacks():
    choices = resolved(TURING).choices
    rows = {SLOTS[field].name: (c.backend, c.why) for field, c in choices.items()}
    assert rows["attention"] == (
        "sdpa",
        "flash_attention_2 needs SM 80 or newer, here is 75",
    )
    assert rows["rms_norm"] == ("liger_kernel", "reference default")
    bare = {SLOTS[field].name: c.backend for field, c in resolved(BARE_HOPPER).choices.items()}
    assert (bare["attention"], bare["cross_entropy_loss"]) == ("sdpa", "chunk_loss")
    assert bare["rms_norm"] == "torch"


def test_what_was_given_is_taken_literally():
    kernels = resolved(AMPERE, attn_implementation="eager", preset="auto")
    choice = kernels.choices["attn_implementation"]
    assert (choice.backend, choice.why, choice.is_given) == ("eager", "given", True)


def test_a_default_that_was_given_is_no_fallback():
    ops, given = OpsImplementationConfig(), frozenset({"attn_implementation"})
    with pytest.raises(KernelError, match="'flash_attention_2' cannot run here: needs cuda"):
        resolve_kernels(ops, given=given, machine=CPU)


def test_all_slots_are_reported_together():
    with pytest.raises(KernelError) as error:
        resolved(CPU, attn_implementation="native-sparse", moe_implementation="fused_quack",
                 chunk_gated_delta_rule_implementation="flash-qla")  # fmt: skip
    keys = [problem.key.rpartition(".")[2] for problem in error.value.problems]
    assert keys == [
        "attn_implementation",
        "moe_implementation",
        "chunk_gated_delta_rule_implementation",
    ]


def test_preset_reference_takes_the_defaults_or_raises():
    with pytest.raises(KernelError) as error:
        resolved(CPU, preset="reference")
    assert len(error.value.problems) == 7  # all but those bound late
    assert not BOUND_LATE & {p.key.rpartition(".")[2] for p in error.value.problems}


def test_preset_eager_runs_anywhere():
    for machine in (CPU, AMPERE, NPU):
        assert set(resolved(machine, preset="eager").names().values()) == {"eager"}


def test_null_attention_is_the_default_of_transformers():
    choice = resolved(CPU, attn_implementation=None).choices["attn_implementation"]
    assert (choice.backend, choice.is_given) == ("sdpa", False)


def test_an_unknown_preset_is_refused():
    with pytest.raises(KernelError, match=r"preset: 'eagre' is not known\. Did you mean 'eager'"):
        resolved(CPU, preset="eagre")


def test_npu_fields_are_checked_against_the_allow_list():
    ops = OpsImplementationConfig(preset="reference")
    problems = check_ops(ops, given=frozenset(), machine=NPU)
    told = {problem.key.rpartition(".")[2]: problem for problem in problems}
    assert str(told["swiglu_mlp_implementation"]) == (
        "model.ops_implementation.swiglu_mlp_implementation: 'liger_kernel' is not supported on "
        "Ascend NPU. To fix: set it to one of eager."
    )
    assert "fused_npu" in told["moe_implementation"].fix
    assert told["attn_implementation"].problem.startswith("'flash_attention_2' cannot run here")


def test_linear_attention_is_refused_only_when_a_model_binds_it():
    field = "causal_conv1d_implementation"
    ops = OpsImplementationConfig(preset="eager")
    kernels = resolve_kernels(ops, given=frozenset({field}), machine=NPU)
    with pytest.raises(KernelError, match="'fla' cannot run here: needs cuda, this machine trains"):
        kernels.kernel(field)


def test_npu_names_are_refused_elsewhere():
    with pytest.raises(KernelError, match="'npu' cannot run here: needs npu") as error:
        resolved(CPU, preset="npu")
    keys = {problem.key.rpartition(".")[2] for problem in error.value.problems}
    assert {"rms_norm_implementation", "cross_entropy_loss_implementation"} <= keys


def test_auto_on_an_npu_stays_within_the_allow_list():
    names = resolved(NPU).names()
    assert names["cross_entropy_loss_implementation"] == "chunk_loss"
    assert names["swiglu_mlp_implementation"] == "eager"


def test_the_table_of_backends_gives_the_reasons():
    rows = {(slot, backend): told for slot, backend, told in table_of_backends(CPU)}
    assert rows["attention", "sdpa"] == "runs here"
    assert rows["moe", "fused_quack"] == (
        "needs cuda, this machine trains on cpu; needs SM 90 or newer, here is none; package "
        "quack-kernels is not installed"
    )
    assert len(rows) == sum(len(list(slot)) for slot in SLOTS.values())


def test_a_field_counts_as_given_where_it_differs_from_its_default():
    ops = OpsImplementationConfig(
        moe_implementation="eager", rms_norm_implementation="liger_kernel"
    )
    assert changed_fields(ops) == {"moe_implementation"}
