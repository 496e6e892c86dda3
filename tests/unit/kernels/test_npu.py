"""Adapters over torch_npu and QuACK, with stand-ins of the same signatures, and Ascend's rules.

Source of the signatures: Ascend's documentation of `npu_rms_norm`, `npu_rotary_mul` and
`npu_grouped_matmul`; quack/gemm_interface.py of quack-kernels 0.6.5.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from omnilit.config import OpsImplementationConfig
from omnilit.errors import KernelError
from omnilit.kernels import rms_norm, rope
from omnilit.kernels.adapters import npu, quack
from omnilit.kernels.cross_entropy import chunk_loss
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, check_ops, resolve_kernels
from omnilit.kernels.slots import BOUND_LATE, NPU_ALLOW_LIST, SLOTS

ASCEND = Machine("npu", packages={"torch-npu": "2.13", "triton-ascend": "3.2", "triton": "3.2"})
BARE = Machine("npu", packages={"torch-npu": "2.13"})
GPU = Machine("cuda", sm=90, packages={"triton": "3"})


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6):  # noqa: A002
    wide = input.float()
    rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd).to(input.dtype) * gamma, rstd


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"):  # noqa: A002
    assert rotary_mode == "half"
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), -1)


def npu_grouped_matmul(x, weight, *, bias=None, group_list=None, split_item=0, group_type=None,
                       group_list_type=0, act_type=0, output_dtype=None):  # fmt: skip
    (a,), (b,) = x, weight
    assert (split_item, group_type) in ((2, 0), (3, 2))
    assert group_list_type == 0
    assert group_list is not None
    assert group_list.dtype is torch.int64
    spans = list(pairwise((0, *group_list.tolist())))
    if group_type == 2:
        return [torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])]
    out = a.new_full((a.shape[0], b.shape[2]), float("nan"))  # as it was, past the last group
    for number, (i, j) in enumerate(spans):
        out[i:j] = a[i:j] @ b[number]
    return [out]


def gemm(A, B, out=None, bias=None, alpha=1.0, out_dtype=None, out_quant_dim=-1,  # noqa: N803
         out_transposed=False, out_per_tensor_scale=None, cu_seqlens_m=None, cu_seqlens_k=None,
         A_idx=None):  # fmt: skip  # noqa: N803
    bounds = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert bounds is not None
    assert bounds.dtype is torch.int32
    kind = 0 if cu_seqlens_k is None else 2
    split = {0: 2, 2: 3}[kind]
    ends = bounds[1:].long()
    return npu_grouped_matmul([A], [B], group_list=ends, split_item=split, group_type=kind)[0]


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    ascend: Any = ModuleType("torch_npu")
    for function in (npu_rms_norm, npu_rotary_mul, npu_grouped_matmul):
        setattr(ascend, function.__name__, function)
    interface: Any = ModuleType("quack.gemm_interface")
    interface.gemm = gemm
    for module in (ascend, ModuleType("quack"), interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_eager(offset, dtype):
    x = torch.randn(3, 8).to(dtype).requires_grad_()
    weight = torch.randn(8).to(dtype).requires_grad_()
    found = []
    for norm in (rms_norm.eager, npu.rms_norm):
        out = norm(x, weight, eps=1e-5, offset=offset)
        found.append((out, *torch.autograd.grad(out.sum(), (x, weight))))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_rms_norm_of_one_type_by_a_weight_of_another_gives_the_wider(dtypes):
    x, weight = torch.randn(3, 8).to(dtypes[0]), torch.randn(8).to(dtypes[1])
    expected, found = (f(x, weight, eps=1e-5) for f in (rms_norm.eager, npu.rms_norm))
    # eager rounds the normalised values to the type of `x` in between
    torch.testing.assert_close(found, expected, rtol=2**-8 if x.itemsize == 2 else 1e-6, atol=0)


@pytest.mark.parametrize("dim", [1, 2])
def test_rotary_equals_eager(dim):
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    if dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angles = torch.randn(1, 5, 4).repeat(1, 1, 2)
    found = [f(q, k, angles.cos(), angles.sin(), dim) for f in (rope.eager, npu.rotary)]
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("cls", [Qwen3MoeExperts, GptOssExperts])
@pytest.mark.parametrize("kernel", [npu.experts, quack.experts])
def test_experts_equal_the_loop_of_their_module(kernel, cls, num_tokens, monkeypatch):
    names = ("num_experts", "num_local_experts", "moe_intermediate_size", "intermediate_size")
    config = SimpleNamespace(**dict.fromkeys(names, 4), hidden_size=6, hidden_act="silu",
                             swiglu_alpha=1.7, swiglu_limit=1.0,
                             _experts_implementation="eager")  # fmt: skip
    experts: Any = cls(config).double()  # float32 is refused by one of them
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(num_tokens, 6, dtype=torch.double, requires_grad=True)
    weights = torch.rand(num_tokens, 2, dtype=torch.double, requires_grad=True)
    index = torch.rand(num_tokens, 3).argsort(-1)[:, :2]  # the last expert gets none
    found = []
    for run in (cls.forward, kernel):
        out = run(experts, hidden, index, weights)
        wanted = (hidden, weights, *experts.parameters())
        found.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_quack_refuses_float32():
    experts = Qwen3MoeExperts(
        SimpleNamespace(num_experts=1, hidden_size=2, moe_intermediate_size=2, hidden_act="silu")
    )
    with pytest.raises(KernelError, match="'fused_quack' takes bfloat16, and was given float32"):
        quack.experts(experts, torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1))


def resolved(machine: Machine, **fields: str) -> KernelSet:
    ops = OpsImplementationConfig(**fields)  # type: ignore[arg-type]
    return resolve_kernels(ops, given=frozenset(fields), machine=machine)


def test_preset_npu_takes_what_ascend_has():
    kernels = resolved(ASCEND, preset="npu")
    names = {SLOTS[field].name: name for field, name in kernels.names().items()}
    assert names == {
        "attention": "sdpa",
        "moe": "fused_npu",
        "cross_entropy_loss": "npu",
        "rms_norm": "npu",
        "swiglu_mlp": "eager",
        "rotary_pos_emb": "npu",
        "load_balancing_loss": "triton",
        "rms_norm_gated": "eager",
        "causal_conv1d": "eager",
        "chunk_gated_delta_rule": "eager",
    }
    assert kernels.kernel("rms_norm_implementation") is npu.rms_norm
    assert kernels.kernel("moe_implementation") is npu.experts
    assert kernels.kernel("cross_entropy_loss_implementation") is chunk_loss  # an alias


def test_auto_on_ascend_takes_its_kernels():
    names = resolved(ASCEND).names()
    assert names["moe_implementation"] == "fused_npu"
    assert names["rms_norm_implementation"] == names["rotary_pos_emb_implementation"] == "npu"
    assert names["swiglu_mlp_implementation"] == "eager"


@pytest.mark.parametrize("field", list(NPU_ALLOW_LIST))
def test_each_general_operation_is_held_to_its_list_before_any_model_is_there(field):
    for name in SLOTS[field]:
        ops = OpsImplementationConfig(preset="eager", **{field: name})  # type: ignore[arg-type]
        problems = check_ops(ops, given=frozenset({field}), machine=ASCEND)
        assert bool(problems) == (name not in NPU_ALLOW_LIST[field])
        for problem in problems:
            assert problem.problem == f"{name!r} is not supported on Ascend NPU"
            assert problem.fix == f"set it to one of {', '.join(NPU_ALLOW_LIST[field])}"


def test_the_general_operations_are_the_six_of_the_reference():
    assert {SLOTS[field].name for field in NPU_ALLOW_LIST} == {
        "moe",
        "cross_entropy_loss",
        "rms_norm",
        "swiglu_mlp",
        "rotary_pos_emb",
        "load_balancing_loss",
    }


@pytest.mark.parametrize("field", sorted(BOUND_LATE))
def test_operations_of_linear_attention_are_refused_only_when_bound(field):
    ops = OpsImplementationConfig(preset="eager")
    for name in SLOTS[field]:
        given = OpsImplementationConfig(preset="eager", **{field: name})  # type: ignore[arg-type]
        assert not check_ops(given, given=frozenset({field}), machine=ASCEND)
    kernels = resolve_kernels(ops, given=frozenset({field}), machine=ASCEND)  # `fla`
    with pytest.raises(KernelError, match="'fla' cannot run here: needs cuda, this machine trains"):
        kernels.kernel(field)


def test_balance_loss_in_triton_needs_its_package_anywhere():
    field = "load_balancing_loss_implementation"
    for machine in (BARE, Machine("cuda", sm=90)):
        with pytest.raises(KernelError, match="package triton is not installed"):
            resolved(machine, preset="eager", load_balancing_loss_implementation="triton")
        assert field in NPU_ALLOW_LIST


@pytest.mark.parametrize("field", [f for f in SLOTS if {"npu", "fused_npu"} & set(SLOTS[f])])
def test_kernels_of_ascend_are_refused_elsewhere(field):
    name = next(name for name in SLOTS[field] if "npu" in name)
    ops = OpsImplementationConfig(preset="eager", **{field: name})  # type: ignore[arg-type]
    (problem,) = check_ops(ops, given=frozenset({field}), machine=GPU)
    assert problem.problem == (
        f"{name!r} cannot run here: needs npu, this machine trains on cuda; package torch-npu is "
        "not installed"
    )
