"""The comparator of gradients fails on everything that is not the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.gradients import compare, gradients_of

Tensors = dict[str, Tensor]


def good() -> Tensors:
    return {"a": torch.tensor([[1.0, -4.0]]), "b": torch.tensor([0.5, 0.25, 0.0])}


def changed(name: str, index: tuple[int, ...], value: float) -> Tensors:
    tensors = good()
    tensors[name][index] = value
    return tensors


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ({}, {}, "nothing to compare with"),
        (good(), {}, "nothing to compare with"),
        ({}, good(), r"2 tensors are missing: \['a', 'b'\]"),
        ({"a": good()["a"]}, good(), r"1 tensors are missing: \['b'\]"),
        ({**good(), "c": torch.ones(1)}, good(), r"1 tensors were not expected: \['c'\]"),
        (changed("a", (0, 0), float("nan")), good(), "a, as found, is not finite"),
        (changed("b", (2,), float("inf")), good(), "b, as found, is not finite"),
        (good(), changed("b", (2,), float("nan")), "b, as expected, is not finite"),
        ({"a": torch.full((1, 2), torch.nan)}, {"a": torch.full((1, 2), torch.nan)}, "not finite"),
        ({**good(), "b": torch.ones(1)}, good(), r"b has the shape \[1\], not \[3\]"),
        ({**good(), "b": torch.zeros(0)}, {**good(), "b": torch.zeros(0)}, "b has no entries"),
        (changed("a", (0, 0), 1.001), good(), r"1 of 2 tensors are off by over 1e-04: a 2\.5e-04"),
        (changed("b", (0,), 1.0), good(), r"b 1\.0e\+00"),
        ({"a": torch.full((2,), 1e-30)}, {"a": torch.zeros(2)}, "a inf"),
        ({n: -t for n, t in good().items()}, good(), "2 of 2 tensors"),
        ({n: 2 * t for n, t in good().items()}, good(), r"a 1\.0e\+00, b 1\.0e\+00"),
    ],
)
def test_what_is_not_the_same_gradient_fails(found: Tensors, expected: Tensors, message: str):
    with pytest.raises(AssertionError, match=message):
        compare(found, expected)


def test_the_worst_tensor_is_named_with_its_share_of_the_largest_entry():
    result = compare(changed("a", (0, 0), 1.0002), good())
    assert (result.name, result.num_tensors) == ("a", 2)
    assert result.largest == pytest.approx(0.0002 / 4, rel=1e-3)


def test_a_zero_gradient_is_compared_too():
    zero = {"a": torch.zeros(2)}
    assert compare(zero, {"a": torch.zeros(2)}).largest == 0.0


def test_a_wider_tolerance_is_taken():
    assert compare(changed("a", (0, 0), 1.2), good(), rtol=0.1).largest == pytest.approx(0.05)


def backward() -> nn.Linear:
    layer = nn.Linear(2, 3)
    layer(torch.ones(2)).sum().backward()
    return layer


def test_gradients_are_copies_of_those_of_all_parameters():
    layer = backward()
    found = gradients_of(layer)
    layer.zero_grad(set_to_none=False)
    assert compare(found, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}).largest == 0.0


def test_a_trainable_parameter_without_a_gradient_fails():
    layer = backward()
    layer.bias.grad = None
    with pytest.raises(AssertionError, match="bias has no gradient"):
        gradients_of(layer)
    layer.bias.requires_grad = False
    assert gradients_of(layer).keys() == {"weight"}
