"""What batch-invariant mode runs on a GPU: its operators, and a model with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tests.helpers.interpreted  # noqa: F401 - before anything that imports triton
from omnilit.config import OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.kernels.triton import row_sums
from omnilit.models.bind import bind_kernels
from tests.helpers.beside import BOUNDS
from tests.helpers.invariance import depends_on_the_batch, invariant_rows
from tests.helpers.models import tiny

HOPPER = Machine("cuda", sm=90, packages={"liger-kernel": "0.8", "triton": "3.9"})
X = {dtype: torch.randn(70, 45).to(dtype) for dtype in BOUNDS}
OPERATIONS: dict[str, Any] = {
    "a product": (
        lambda x: row_sums.multiply(x, x[:9].t(), x.dtype),
        lambda x: x @ x[:9].t(),
    ),
    "a wide product": (
        lambda x: row_sums.multiply(x, x[:9].t(), torch.float32),
        lambda x: x.float() @ x[:9].float().t(),
    ),
    "a log-normaliser": (row_sums.log_norms, lambda x: x.float().logsumexp(-1)),
    "a mean": (lambda x: row_sums.mean(x, x.dtype), lambda x: x.mean(-1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_rows_are_torchs_and_those_of_a_part_the_same_bits(name, dtype):
    kernel, reference = OPERATIONS[name]
    x = X[dtype]
    found, expected = kernel(x), reference(x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    distance = (found.double() - expected.double()).abs().max()
    assert distance <= BOUNDS[dtype] * expected.abs().max()
    if "product" not in name:  # whose second matrix would be another one
        for rows in (slice(0, 1), slice(5, 9), slice(60, 70)):
            assert torch.equal(kernel(x[rows]), found[rows])


def test_columns_beyond_a_block_are_counted():
    x = torch.randn(3, row_sums.COLUMNS + 5)
    torch.testing.assert_close(row_sums.mean(x, x.dtype), x.mean(-1))
    torch.testing.assert_close(row_sums.log_norms(x), x.logsumexp(-1))
    nothing = torch.full((2, 5), -torch.inf)
    with np.errstate(divide="ignore"):  # the interpreter's logarithm of 0
        assert torch.equal(row_sums.log_norms(nothing), nothing.logsumexp(-1))


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("qwen3", ((5, 2),)),
        ("qwen3_moe", ((13, 2, 70), (70, 1))),
        ("gemma2", ((13, 2, 70), (70, 1))),
    ],
)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_logits_and_losses_do_not_depend_on_what_a_sample_is_packed_with(family, rows):
    model = tiny(family, num_hidden_layers=1)
    kernels = resolve_kernels(
        OpsImplementationConfig(), given=frozenset(), machine=HOPPER, is_invariant=True
    )
    binding = bind_kernels(model, kernels)
    with invariant_rows("cuda"):
        assert not depends_on_the_batch(model, binding, rows)
