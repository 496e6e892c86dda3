"""Sequences that several ranks share give the loss and the gradients of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from omnilit.kernels.blocks import Block, pair_blocks
from omnilit.models.ring import KEYS_TAG
from omnilit.parallel import gather, ulysses
from omnilit.parallel.ring import Passing, pass_on
from omnilit.testing import run_ranks
from tests.helpers.sequence_split import Case, check, run_broken, run_cases

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ULYSSES, GATHER = {"ulysses_size": 2}, {"cp_size": 2}
RING = {"cp_size": 2, "cp_method": "ring"}
ASYNC = {"ulysses_size": 2, "enable_async": True}
FAMILIES = ("qwen3", "gemma3", "gpt_oss", "deepseek_v3")  # plain, sliding, sinks, MLA

TWO = (
    *(Case(family, sizes) for sizes in (ULYSSES, GATHER, RING) for family in FAMILIES),
    Case("gemma2", ULYSSES, attention="eager"),  # caps its scores
    Case("gemma2", GATHER),
    Case("gemma2", RING),
    Case("qwen3", ULYSSES, {"num_key_value_heads": 1}, recompute=True, is_bare=True),
    Case("qwen3_moe", GATHER, recompute=True, is_bare=True),
    Case("qwen3", RING, {"num_key_value_heads": 1}, recompute=True, is_bare=True),
    *(Case(family, ASYNC) for family in ("qwen3", "llama", "qwen2", "gemma3")),
    Case("qwen3_moe", ASYNC, recompute=True, is_bare=True),
    Case("qwen3_tied", ULYSSES, is_ddp=True),
    Case("qwen3", GATHER, is_ddp=True),
)
FOUR = (
    Case("qwen3", {"ulysses_size": 4}, {"num_key_value_heads": 1}),
    Case("gemma3", {"ulysses_size": 4}, {"num_attention_heads": 12, "num_key_value_heads": 3}),
    Case("gpt_oss", {"ulysses_size": 4}),
    Case("deepseek_v3", {"ulysses_size": 4}),
    Case("gpt_oss", ULYSSES | GATHER),
    Case("deepseek_v3", ULYSSES | GATHER, is_bare=True),
    Case("gpt_oss", ULYSSES | RING),
    Case("deepseek_v3", ULYSSES | RING, is_bare=True),
    Case("qwen3", ASYNC | GATHER, recompute=True),
    Case("llama", {**ASYNC, "ulysses_size": 4}, {"num_key_value_heads": 1}),
    Case("gemma3", {"cp_size": 4}),
    Case("gpt_oss", {**RING, "cp_size": 4}),
    Case("deepseek_v3", RING),
    Case("qwen3", ULYSSES),  # of two data ranks, each with a row of its own
    Case("gemma3", {"dp_replicate_size": 2, **ULYSSES}, recompute=True),
    Case("qwen3_tied", GATHER, is_ddp=True),
)


def unreversed(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """A backward that hands on what it got, as if every rank had sent itself all."""
    group, split, join = ctx.exchange
    shares = [g.chunk(group.size(), join)[group.rank()] for g in gradients]
    repeats = [torch.cat([share] * group.size(), split) for share in shares]
    return None, None, None, *repeats


def own_alone(
    gradients: Any, group: dist.ProcessGroup, order: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Gradients of keys and values without those of the other ranks' queries."""
    per_rank = len(order) // group.size()
    mine = order[group.rank() * per_rank :][:per_rank]
    chunks = [gradient.chunk(len(order), gather.TOKENS) for gradient in gradients]
    return tuple(torch.cat([held[at] for at in mine], gather.TOKENS) for held in chunks)


def out_of_order(
    tensors: Any, group: dist.ProcessGroup, order: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Keys and values that are put together in another order than that of the row."""
    return gather.gather_row(tensors, group, order[::-1])


def tiled(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Key heads repeated one after the other, away from their queries."""
    return x.repeat(1, num_ranks, 1, 1)


def one_segment(spans: Any, key_spans: Any, bounds: Any, rule: Any) -> Iterator[Block]:
    """Blocks of a ring that knows of no segments."""
    return pair_blocks(spans, key_spans, (0, bounds[-1]), rule)


def stay(tensor: torch.Tensor, group: dist.ProcessGroup, *, tag: int) -> Passing:
    """Gradients that are not handed on."""
    return pass_on(tensor, group, tag=tag) if tag == KEYS_TAG else Passing(tensor, tensor, [])


def flipped(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Gradients that go to the wrong ranks."""
    return ctx.exchange.start(gradients[0].flip(ulysses.TOKENS), ulysses.TOKENS), None


THREE = {"num_attention_heads": 6, "num_key_value_heads": 3}
BROKEN: tuple[tuple[Case, str, Any], ...] = (
    (Case("qwen3", ULYSSES), "omnilit.parallel.ulysses._Exchange.backward", unreversed),
    (Case("qwen3", ULYSSES, THREE), "omnilit.models.sequence.repeat_heads", tiled),
    (Case("qwen3", GATHER), "omnilit.parallel.gather._scatter_sums", own_alone),
    (Case("qwen3", GATHER), "omnilit.models.sequence.gather_row", out_of_order),
    (Case("qwen3", ASYNC), "omnilit.parallel.ulysses_async._Finish.backward", flipped),
    (Case("qwen3", RING), "omnilit.models.ring.pair_blocks", one_segment),
    (Case("qwen3", RING), "omnilit.models.ring.pass_on", stay),
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(run_cases, 2, TWO, tmp_path=tmp_path_factory.mktemp("two"), timeout_s=150)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(run_cases, 4, FOUR, tmp_path=tmp_path_factory.mktemp("four"), timeout_s=150)


@pytest.mark.parametrize("number", range(len(TWO)), ids=list(map(str, TWO)))
def test_two_ranks_share_sequences(number, two):
    for rank in two:
        check(rank[number], TWO[number], 2)


@pytest.mark.parametrize("number", range(len(FOUR)), ids=list(map(str, FOUR)))
def test_four_ranks_share_sequences(number, four):
    for rank in four:
        check(rank[number], FOUR[number], 4)


def test_a_mechanism_that_is_broken_on_purpose_is_caught(tmp_path):
    ranks = run_ranks(run_broken, 2, BROKEN, tmp_path=tmp_path)
    for number, (case, *_) in enumerate(BROKEN):
        for rank in ranks:
            with pytest.raises(AssertionError, match=case.family):
                check(rank[number], case, 2)
