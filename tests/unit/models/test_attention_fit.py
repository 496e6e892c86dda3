"""Kernels of attention that cannot do what a model asks: refused or replaced when it is bound."""

from __future__ import annotations

import pytest

from omnilit.config import OpsImplementationConfig
from omnilit.errors import KernelError
from omnilit.kernels.attention_limits import Demand, shortcomings
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.models.attention_fit import fit_attention, read_demand
from omnilit.models.bind import bind_kernels
from tests.helpers.models import tiny

FIELD = "attn_implementation"
PACKAGES = {"flash-attn": "2.8", "flash-attn-3": "3", "flash-attn-4": "4", "triton": "3"}
HOPPER, BLACKWELL = (Machine("cuda", sm=sm, packages=PACKAGES) for sm in (90, 100))


def kernels_of(**fields: str) -> KernelSet:
    ops = OpsImplementationConfig(**fields)  # type: ignore[arg-type]
    return resolve_kernels(ops, given=frozenset(fields) - {"preset"}, machine=HOPPER)


@pytest.mark.parametrize(
    ("backend", "demand", "machine", "reason"),
    [
        ("flash_attention_2", Demand(has_sinks=True), HOPPER, "has no attention sinks"),
        ("flash_attention_3", Demand(has_sinks=True), HOPPER, "has no attention sinks"),
        ("flash_attention_3", Demand(dropout=0.1), HOPPER, "has no dropout"),
        ("flash_attention_4", Demand(dropout=0.1), HOPPER, "has no dropout"),
        ("flex_attention", Demand(dropout=0.1), HOPPER, "has no dropout"),
        (
            "flash_attention_2",
            Demand(head_dim=288),
            HOPPER,
            "takes head dims up to 256 that 8 divides, and this one is 288",
        ),
        (
            "flash_attention_2",
            Demand(head_dim=100),
            HOPPER,
            "takes head dims up to 256 that 8 divides, and this one is 100",
        ),
        (
            "flash_attention_3",
            Demand(head_dim=64, value_dim=128),
            HOPPER,
            "has one head dim, and values are wider (128 over 64)",
        ),
        (
            "flash_attention_4",
            Demand(head_dim=160, value_dim=160),
            BLACKWELL,
            "does not take head dims 160 and 160 on SM 100",
        ),
        (
            "flash_attention_4",
            Demand(head_dim=288),
            HOPPER,
            "does not take head dims 288 and 288 on SM 90",
        ),
        (
            "flash_attention_4",
            Demand(head_dim=256, value_dim=256, softcap=50.0),
            BLACKWELL,
            "caps no scores at head dim 256 on SM 100",
        ),
        (
            "flash_attention_4",
            Demand(has_sinks=True),
            Machine("cuda", sm=120),
            "has attention sinks from SM 90 to 119 alone, here is 120",
        ),
    ],
)
def test_what_a_kernel_cannot_do_is_named(backend, demand, machine, reason):
    assert shortcomings(backend, demand, machine) == (reason,)


@pytest.mark.parametrize(
    ("backend", "demand", "machine"),
    [
        ("flash_attention_2", Demand(head_dim=256, value_dim=64, softcap=5.0, dropout=0.1), HOPPER),
        ("flash_attention_3", Demand(head_dim=192, value_dim=128, softcap=5.0), HOPPER),
        ("flash_attention_4", Demand(head_dim=192, value_dim=128, has_sinks=True), BLACKWELL),
        ("flash_attention_4", Demand(head_dim=256, value_dim=256, softcap=5.0), HOPPER),
        ("flex_attention", Demand(head_dim=100, has_sinks=True, softcap=5.0), HOPPER),
        ("sdpa", Demand(head_dim=300, has_sinks=True, dropout=0.5), HOPPER),
        ("of_a_plugin", Demand(has_sinks=True), HOPPER),
    ],
)
def test_what_a_kernel_can_do_is_not_refused(backend, demand, machine):
    assert shortcomings(backend, demand, machine) == ()


def test_demands_are_read_off_the_modules():
    found = {name: read_demand(tiny(name).model.layers[1].self_attn)
             for name in ("qwen3", "gpt_oss", "gemma2", "deepseek_v3")}  # fmt: skip
    assert found["qwen3"] == Demand(head_dim=16, value_dim=16)
    assert found["gpt_oss"].has_sinks
    assert found["gemma2"].softcap == 50.0
    assert (found["deepseek_v3"].head_dim, found["deepseek_v3"].value_dim) == (24, 16)


def test_a_given_kernel_that_cannot_run_the_model_is_refused_when_it_is_bound():
    with pytest.raises(KernelError) as error:
        bind_kernels(tiny("gpt_oss"), kernels_of(attn_implementation="flash_attention_3"))
    assert str(error.value) == (
        "model.ops_implementation.attn_implementation: 'flash_attention_3' cannot run "
        "GptOssForCausalLM: has no attention sinks. To fix: set it to sdpa."
    )


def test_a_default_that_was_taken_literally_is_refused_too():
    machine = Machine("cuda", sm=90, packages={**PACKAGES, "liger-kernel": "0.8"})
    ops = OpsImplementationConfig(preset="reference")
    literal = resolve_kernels(ops, given=frozenset(), machine=machine)
    with pytest.raises(KernelError, match="'flash_attention_2' cannot run GptOssForCausalLM"):
        fit_attention(tiny("gpt_oss"), literal)


def test_auto_takes_another_and_says_why():
    kernels = fit_attention(tiny("gpt_oss"), kernels_of())
    choice = kernels.choices[FIELD]
    assert (choice.backend, choice.why) == ("sdpa", "flash_attention_2 has no attention sinks")
    assert fit_attention(tiny("qwen3"), kernels_of()).choices[FIELD].backend == "flash_attention_2"
