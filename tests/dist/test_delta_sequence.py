"""Linear attention of sequences that several ranks share equals that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from omnilit.kernels.linear_attention import causal_conv1d
from omnilit.models.delta_sequence import SplitConvolution
from omnilit.parallel.sequence import SequenceLayout
from omnilit.testing import run_ranks
from tests.helpers.sequence_split import Case, check, run_broken, run_cases

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ULYSSES, GATHER = {"ulysses_size": 2}, {"cp_size": 2}
RING = {"cp_size": 2, "cp_method": "ring"}
# Rounding of the delta rule, as in one process; what is broken below is off by more than 1e-2
CLOSE = 1e-4

TWO = (
    *(Case(family, ULYSSES) for family in ("qwen3_5", "qwen3_next", "qwen3_5_moe")),
    Case("olmo_hybrid", GATHER),
    Case("qwen3_5", RING, recompute=True, is_bare=True),
    Case("qwen3_5", ULYSSES, {"linear_num_key_heads": 1}, is_ddp=True),
)
FOUR = (
    Case("qwen3_5", {"ulysses_size": 4}),  # each of two key heads on two ranks
    Case("qwen3_next", ULYSSES | GATHER, recompute=True),
    Case("qwen3_5", GATHER),  # of two data ranks, each with a row of its own
)


def without_the_past(tensors: Any, group: dist.ProcessGroup, order: Any) -> tuple[Tensor, ...]:
    """Nothing of what other ranks hold."""
    return tuple(torch.cat([0 * x] * group.size(), 2) for x in tensors)


def as_it_came(x: Tensor, order: Any) -> Tensor:
    """Parts of a row in the order of the ranks."""
    return x


def tiled(x: Tensor, num_ranks: int) -> Tensor:
    """Key heads repeated one after the other, away from their values."""
    return x.repeat(1, 2, 1, 1)


HEADS = {"linear_num_key_heads": 3, "linear_num_value_heads": 6}
BROKEN: tuple[tuple[Case, str, Any], ...] = (
    (Case("qwen3_5", ULYSSES), "omnilit.models.delta_sequence.gather_row", without_the_past),
    (Case("qwen3_5", GATHER), "omnilit.models.delta_sequence._reorder", as_it_came),
    (Case("qwen3_5", ULYSSES, HEADS), "omnilit.models.delta_sequence.repeat_heads", tiled),
)


def test_two_ranks_share_sequences(tmp_path):
    ranks = run_ranks(run_cases, 2, TWO, tmp_path=tmp_path, timeout_s=150)
    for number, case in enumerate(TWO):
        for rank in ranks:
            check(rank[number], case, 2, rtol=CLOSE)


def test_four_ranks_share_sequences(tmp_path):
    ranks = run_ranks(run_cases, 4, FOUR, tmp_path=tmp_path, timeout_s=150)
    for number, case in enumerate(FOUR):
        for rank in ranks:
            check(rank[number], case, 4, rtol=CLOSE)


def test_a_mechanism_that_is_broken_on_purpose_is_caught(tmp_path):
    ranks = run_ranks(run_broken, 2, BROKEN, tmp_path=tmp_path)
    for number, (case, *_) in enumerate(BROKEN):
        for rank in ranks:
            with pytest.raises(AssertionError, match=case.family):
                check(rank[number], case, 2, rtol=100 * CLOSE)


def convolve_parts() -> list[tuple[Tensor, Tensor, Tensor]]:
    """The tokens of this rank, and what it makes of them: output and gradient."""
    group, rank, found = dist.group.WORLD, dist.get_rank(), []
    assert group is not None
    for layout, bounds, width in SHORT:
        torch.manual_seed(0)
        x, weight = torch.randn(bounds[-1], 2), torch.randn(2, width)
        index = layout.index(rank, bounds)
        own = x[index].requires_grad_()
        out = SplitConvolution(causal_conv1d, layout, group)(own, weight, None, bounds=bounds)
        (gradient,) = torch.autograd.grad(out.square().sum(), own)
        found.append((index, out.detach(), gradient))
    return found


# What a rank holds is shorter than what a token looks back on; one tap, which looks at nothing
SHORT = (
    (SequenceLayout(1, 4), (0, 8), 4),
    (SequenceLayout(1, 4), (0, 3, 4, 8), 7),
    (SequenceLayout(2, 2), (0, 5, 8), 4),
    (SequenceLayout(4, 1), (0, 8, 16), 2),
    (SequenceLayout(4, 1), (0, 1, 16), 1),
)


def test_a_convolution_reaches_over_ranks_that_hold_a_token_or_two(tmp_path):
    ranks = run_ranks(convolve_parts, 4, tmp_path=tmp_path)
    for number, (_, bounds, width) in enumerate(SHORT):
        torch.manual_seed(0)
        x, weight = torch.randn(bounds[-1], 2).requires_grad_(), torch.randn(2, width)
        out = causal_conv1d(x, weight, None, bounds=bounds)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        for rank in ranks:
            index, own, own_gradient = rank[number]
            torch.testing.assert_close(own, out[index].detach())
            torch.testing.assert_close(own_gradient, gradient[index])
