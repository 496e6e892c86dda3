"""A kernel beside its reference: values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of the largest value: float32 sums in another order; bfloat16 has 8 bits, and two roundings of a
# value are 2^-7 apart
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


def compare(
    kernel: Callable[..., Any], reference: Callable[..., Any], leaves: Sequence[Tensor]
) -> None:
    """Assert that both give the same, and the same gradients to all of `leaves`."""
    ours, theirs = (_values(function, leaves) for function in (kernel, reference))
    assert len(ours) == len(theirs)
    bound = max(BOUNDS[leaf.dtype] for leaf in leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.isfinite(one).all()
        distance = (one.double() - other.double()).abs()
        assert distance.numel() == 0 or distance.max() <= bound * max(other.abs().max(), 1e-3)


def _values(function: Callable[..., Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    out = function()
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, along)]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random values that gradients are asked of."""
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()
