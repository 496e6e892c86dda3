"""Gradients of two runs side by side, with no way to pass by comparing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

RTOL = 1e-4
MAX_LISTED = 5


@dataclass(frozen=True)
class Deviation:
    """How far the worst tensor lies off.

    Args:
        largest: Of all entries' absolute differences, over its tensor's largest expected entry.
        name: Of that tensor.
        num_tensors: How many were compared.
    """

    largest: float
    name: str
    num_tensors: int


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients of all trainable parameters by name, as copies; every rank calls.

    Raises:
        AssertionError: A trainable parameter has none.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = full.detach().clone()
    return found


def compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = RTOL
) -> Deviation:
    """Check that each tensor is the expected one, up to a share of its largest entry.

    A tensor that is expected to be zero throughout has to be.

    Args:
        found: By name.
        expected: By name.
        rtol: Largest difference allowed, relative to the expected tensor's largest entry.

    Raises:
        AssertionError: Anything but that: differences, NaN or infinity on either side, missing or
            additional names, other shapes, nothing to compare.
    """
    assert expected, "nothing to compare with"
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not missing, f"{len(missing)} tensors are missing: {missing[:MAX_LISTED]}"
    assert not more, f"{len(more)} tensors were not expected: {more[:MAX_LISTED]}"
    errors = {name: _relative_error(name, found[name], full) for name, full in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= rtol}
    worst = sorted(wrong, key=lambda name: -wrong[name])[:MAX_LISTED]
    listed = ", ".join(f"{name} {wrong[name]:.1e}" for name in worst)
    assert not wrong, f"{len(wrong)} of {len(errors)} tensors are off by over {rtol:.0e}: {listed}"
    name = max(errors, key=lambda name: errors[name])
    return Deviation(errors[name], name, len(errors))


def _relative_error(name: str, found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (
        f"{name} has the shape {list(found.shape)}, not {list(expected.shape)}"
    )
    assert expected.numel(), f"{name} has no entries"
    for side, tensor in (("found", found), ("expected", expected)):
        assert torch.isfinite(tensor).all(), f"{name}, as {side}, is not finite"
    difference = float((found.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale
