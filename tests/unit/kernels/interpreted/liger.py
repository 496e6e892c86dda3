"""Liger's kernels through our slots, beside the references."""

from __future__ import annotations

import pytest
import torch

import tests.helpers.interpreted  # noqa: F401 - before anything that imports triton
from omnilit.errors import KernelError
from omnilit.kernels import CROSS_ENTROPY, RMS_NORM, ROTARY, SWIGLU, OpSlot
from omnilit.kernels.machine import Machine
from omnilit.kernels.slot import Kernel
from omnilit.types import IGNORE
from tests.helpers.beside import compare, leaf

HOPPER = Machine("cuda", sm=90, packages={"liger-kernel": "0.8", "triton": "3.9"})
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def both(slot: OpSlot) -> tuple[Kernel, Kernel]:
    return slot.resolve("liger_kernel", HOPPER), slot.resolve("eager", HOPPER)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@TYPES
def test_rms_norm(offset, dtype):
    kernel, reference = both(RMS_NORM)
    x, weight = leaf(7, 24, dtype=dtype), leaf(24, dtype=dtype)
    compare(
        lambda: kernel(x, weight, eps=1e-6, offset=offset),
        lambda: reference(x, weight, eps=1e-6, offset=offset),
        (x, weight),
    )


@TYPES
def test_swiglu(dtype):
    kernel, reference = both(SWIGLU)
    gate, up = leaf(5, 24, dtype=dtype), leaf(5, 24, dtype=dtype)
    # its backward writes over what it was given: the outputs of two products, in a model
    compare(lambda: kernel(gate.clone(), up.clone()), lambda: reference(gate, up), (gate, up))


@TYPES
def test_rotary(dtype):
    kernel, reference = both(ROTARY)
    q, k = leaf(1, 7, 4, 16, dtype=dtype), leaf(1, 7, 2, 16, dtype=dtype)
    angles = torch.randn(1, 7, 8).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # it writes over what it was given, where that lies as attention's projections leave it
    compare(
        lambda: kernel(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin),
        lambda: reference(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        (q, k),
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_of_a_linear_head(softcap):
    kernel, reference = both(CROSS_ENTROPY)
    hidden, weight = leaf(13, 16), leaf(37, 16)
    targets = torch.randint(0, 37, (13,))
    targets[3] = IGNORE
    compare(
        lambda: kernel(hidden, weight, targets, softcap=softcap).sum() / 13,
        lambda: reference(hidden, weight, targets, softcap=softcap).sum() / 13,
        (hidden, weight),
    )


def test_cross_entropy_without_a_supervised_token_keeps_a_graph():
    kernel, _ = both(CROSS_ENTROPY)
    hidden, weight = leaf(0, 16), leaf(37, 16)
    kernel(hidden, weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_rows_that_weigh_differently_are_refused():
    kernel, _ = both(CROSS_ENTROPY)
    losses = kernel(leaf(3, 16), leaf(37, 16), torch.tensor([1, 2, 3]))
    with pytest.raises(KernelError, match="has one weight for all rows"):
        (losses * torch.tensor([1.0, 2.0, 1.0])).sum().backward()
