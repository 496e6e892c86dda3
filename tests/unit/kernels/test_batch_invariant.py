"""Operators of batch-invariant mode on a CPU, and which kernels go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, linear, silu, softplus

from omnilit.config import OpsImplementationConfig
from omnilit.errors import KernelError
from omnilit.kernels.batch_invariant import BACKENDS, BLOCKS, _CPURows
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, changed_fields, resolve_kernels
from omnilit.kernels.slots import BOUND_LATE, SLOTS
from tests.helpers.invariance import invariant_rows

PACKAGES = {"liger-kernel": "0.8", "triton": "3.9", "flash-linear-attention": "0.6"}


@dataclass(frozen=True)
class Others:
    """What rows are combined with: MKL treats them by their place where there are 7 columns."""

    weight: Tensor
    bias: Tensor
    wide: Tensor

    def to(self, dtype: torch.dtype) -> Others:
        return Others(self.weight.to(dtype), self.bias.to(dtype), self.wide.to(dtype))


OTHERS = {
    dtype: Others(torch.randn(7, 33), torch.randn(7), torch.randn(33, 5000)).to(dtype)
    for dtype in (torch.float32, torch.bfloat16)
}
OPERATIONS: dict[str, Any] = {
    "a product": lambda x, by: x @ by.weight.t(),
    "with a matrix as it lies": lambda x, by: x @ by.weight.t().contiguous(),
    "with a bias": lambda x, by: linear(x, by.weight, by.bias),
    "scaled": lambda x, by: torch.addmm(by.bias, x, by.weight.t(), beta=2, alpha=3),
    "without the bias": lambda x, by: torch.addmm(by.bias * torch.nan, x, by.weight.t(), beta=0),
    "log-softmax": lambda x, by: x.log_softmax(-1),
    "log-normaliser": lambda x, by: x.logsumexp(-1),
    "with many columns": lambda x, by: x @ by.wide,
    "a mean": lambda x, by: x.mean(-1),
    "a mean kept": lambda x, by: x.mean(-1, keepdim=True),
    "silu": lambda x, by: silu(x),
    "gelu": lambda x, by: gelu(x),
    "gelu by tanh": lambda x, by: gelu(x, approximate="tanh"),
    "sigmoid": lambda x, by: x.sigmoid(),
    "softplus": lambda x, by: softplus(x, beta=2, threshold=1),
}
# Against torch's own: sums of 33 in another order; bfloat16 has 8 bits, and where torch rounds
# between the steps of an operation ours rounds once
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_operators_compute_what_torchs_do_whatever_the_other_rows_are(name, dtype):
    operation, x = OPERATIONS[name], torch.randn(150, 33).to(dtype)

    def apply(rows: Tensor) -> Tensor:
        return operation(rows, OTHERS[dtype])

    expected = apply(x)
    with invariant_rows():
        found = apply(x)
        for rows in (slice(0, 1), slice(3, 10), slice(60, 70), slice(1, None)):
            assert torch.equal(apply(x[rows].clone()), found[rows])
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    distance = (found.double() - expected.double()).abs().max()
    assert distance <= BOUNDS[dtype] * expected.abs().max()


@pytest.mark.parametrize("operation", [silu, gelu, torch.sigmoid, softplus])
def test_single_values_come_out_alike_beside_any_others(operation):
    x = torch.randn(5000) * 3
    with invariant_rows():
        found = operation(x)
        assert torch.equal(torch.cat([operation(part.clone()) for part in x.split(1)]), found)
    torch.testing.assert_close(found, operation(x), rtol=1e-5, atol=1e-6)


def test_a_matrix_of_zeros_does_not_decide_for_the_next_of_its_shape():
    x, by = torch.randn(150, 33), OTHERS[torch.float32]
    with invariant_rows():
        assert not (x @ torch.zeros_like(by.weight).t()).any()
        found = x @ by.weight.t()
        for rows in (slice(0, 1), slice(3, 10), slice(60, 70), slice(1, None)):
            assert torch.equal(x[rows].clone() @ by.weight.t(), found[rows])


@pytest.mark.parametrize(
    "run",
    [
        lambda a, b: a.bfloat16() @ b,
        lambda a, b: a @ b.bfloat16(),
        lambda a, b: a @ b[:3],
        lambda a, b: torch.addmm(torch.zeros(2), a.bfloat16(), b),
        lambda a, b: torch.addmm(torch.zeros(2).bfloat16(), a, b),
        lambda a, b: torch.addmm(torch.zeros(2), a, b[:3]),
    ],
)
def test_operands_that_torch_refuses_are_refused(run):
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    with pytest.raises(RuntimeError) as expected:
        run(a, b)
    with invariant_rows(), pytest.raises(RuntimeError) as error:
        run(a, b)
    assert str(error.value) == str(expected.value)


def test_means_and_normalisers_run_along_any_dimensions():
    x = torch.randn(3, 4, 5)
    for run in (
        lambda: x.mean((0, 2)),
        lambda: x.mean((0, 2), keepdim=True),
        lambda: x.mean(1, dtype=torch.float64),
        lambda: x[0, 0].mean(0),
        lambda: x.logsumexp((0, 1)),
        lambda: x.log_softmax(1),
        lambda: x[0, 0, 0].log_softmax(0),
        lambda: torch.full((2, 3), -torch.inf).logsumexp(1),
        lambda: x[:0].mean(1),
        lambda: x.double().mean(1),
        lambda: x.double().log_softmax(1),
        lambda: x.double()[0] @ x.double()[1].t(),
        lambda: x.double().sigmoid(),
        lambda: x.long().sigmoid(),
        lambda: torch.ones(2, 3).long() @ torch.ones(3, 2).long(),
        lambda: torch.ones(0, 3) @ torch.ones(3, 2),
        lambda: torch.ones(2, 0) @ torch.ones(0, 2),
    ):
        expected = run()
        with invariant_rows():
            torch.testing.assert_close(run(), expected)


def test_gradients_are_those_of_torch():
    weight = torch.randn(9, 33, requires_grad=True)
    x, targets = torch.randn(40, 33, requires_grad=True), torch.randint(0, 9, (40,))

    def run() -> list[Tensor]:
        loss = cross_entropy(linear(silu(x), weight), targets) + x.mean(-1).square().sum()
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    expected = run()
    with invariant_rows():
        found = run()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_shape_whose_rows_differ_by_place_is_multiplied_a_row_at_a_time(monkeypatch):
    rows = _CPURows()
    assert rows._find_block(torch.randn(33, 64)) == BLOCKS[0]
    monkeypatch.setattr("omnilit.kernels.batch_invariant._rows_agree", lambda b, size: size == 1)
    x, weight = torch.randn(5, 12), torch.randn(12, 8)
    assert rows._find_block(weight) == 1
    torch.testing.assert_close(rows.multiply(x, weight, torch.float32), x @ weight)


def resolved(machine: Machine, **fields: Any) -> KernelSet:
    ops = OpsImplementationConfig(**fields)
    return resolve_kernels(ops, given=changed_fields(ops), machine=machine, is_invariant=True)


@pytest.mark.parametrize("machine", [Machine(), Machine("cuda", sm=90, packages=PACKAGES)])
def test_auto_takes_kernels_that_go_with_the_mode(machine):
    names = resolved(machine).names()
    asked = names.keys() - BOUND_LATE
    assert all(names[field] in BACKENDS[field] for field in asked)
    assert names["moe_implementation"] == ("eager" if machine.sm is None else "fused_triton")
    assert names["rms_norm_implementation"] == ("torch" if machine.sm is None else "triton")
    assert names["cross_entropy_loss_implementation"] == "chunk_loss"


def test_a_given_kernel_that_does_not_go_with_the_mode_is_refused():
    with pytest.raises(KernelError) as error:
        resolved(Machine(), moe_implementation="torch")
    assert str(error.value) == (
        "model.ops_implementation.moe_implementation: 'torch' is not known to compute a row alike "
        "in any batch, as train.enable_batch_invariant_mode wants. To fix: use one of eager, "
        "fused_triton."
    )
    with pytest.raises(KernelError, match="needs a GPU or a CPU, here is an NPU"):
        resolved(Machine("npu", packages={"torch-npu": "2.13"}))


def test_what_goes_with_the_mode_are_backends_that_there_are():
    assert BACKENDS.keys() == SLOTS.keys()
    assert all(name in SLOTS[field] for field, names in BACKENDS.items() for name in names)
