"""fla's kernels through our slots, beside the references, under Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import tests.fla.driver  # noqa: F401 - before anything that imports triton
from omnilit.kernels import CAUSAL_CONV1D, GATED_DELTA_RULE, RMS_NORM_GATED, OpSlot
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import Choice, KernelSet
from omnilit.kernels.slot import Kernel
from omnilit.kernels.slots import BOUND_LATE
from omnilit.models.bind import bind_kernels
from tests.helpers.beside import compare, leaf
from tests.helpers.models import gradients, packed_batch, tiny, worst_difference
from tests.helpers.recurrence import check_rule, delta_inputs
from tests.helpers.spread import cpu_kernels

HOPPER = Machine("cuda", sm=90, packages={"flash-linear-attention": "0.6", "triton": "3.9"})
ROWS = ((0, 5), (0, 1, 4, 70), (0, 64, 96, 100))
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# numbers of later tokens, which a mask takes out again; a GPU says nothing of them
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) enc:RuntimeWarning"),
    pytest.mark.timeout(300),
]


def both(slot: OpSlot) -> tuple[Kernel, Kernel]:
    return slot.resolve("fla", HOPPER), slot.resolve("eager", HOPPER)


@TYPES
def test_rms_norm_gated(dtype):
    kernel, reference = both(RMS_NORM_GATED)
    x, gate, weight = (leaf(*shape, dtype=dtype) for shape in ((9, 16), (9, 16), (16,)))
    compare(
        lambda: kernel(x, gate, weight, eps=1e-5),
        lambda: reference(x, gate, weight, eps=1e-5),
        (x, gate, weight),
    )


@TYPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_convolution(bounds, has_bias, dtype):
    kernel, reference = both(CAUSAL_CONV1D)
    x, weight, bias = (leaf(*shape, dtype=dtype) for shape in ((bounds[-1], 24), (24, 4), (24,)))
    given = bias if has_bias else None
    compare(
        lambda: kernel(x, weight, given, bounds=bounds),
        lambda: reference(x, weight, given, bounds=bounds),
        (x, weight, *([bias] if has_bias else [])),
    )


@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_delta_rule_equals_its_definition(bounds):
    # the largest measured is 1.1e-5, and 8e-6 of the reference
    check_rule(GATED_DELTA_RULE.resolve("fla", HOPPER), bounds, bound=3e-5)


def test_delta_rule_of_a_packed_row_is_that_of_its_segments():
    kernel, _ = both(GATED_DELTA_RULE)
    inputs, bounds = delta_inputs(40), (0, 13, 40)
    packed = kernel(*inputs, bounds=bounds)
    alone = [kernel(*(x[a:b] for x in inputs), bounds=(0, b - a)) for a, b in pairwise(bounds)]
    assert torch.equal(packed, torch.cat(alone))


def test_a_packed_model_equals_its_eager_self():
    choices = {
        name: Choice("fla", "given", is_given=True) if name in BOUND_LATE else choice
        for name, choice in cpu_kernels().choices.items()
    }
    models, batch, losses = [tiny("qwen3_5"), tiny("qwen3_5")], packed_batch((5, 1, 40, 9)), []
    for model, kernels in zip(models, (cpu_kernels(), KernelSet(choices, HOPPER)), strict=True):
        binding = bind_kernels(model, kernels)
        losses.append(binding.head.forward(model, batch).token_losses.mean())
        losses[-1].backward()
        binding.verify_called()
        bound = {row.field for row in binding.table if row.backend == "fla" and row.is_bound}
        assert bound == (BOUND_LATE if model is models[1] else set())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    # fla takes the gradient of decays from a difference of float32 sums over a chunk: 2e-4 there,
    # 4e-5 elsewhere
    assert worst_difference(*map(gradients, models)) <= 1e-3
