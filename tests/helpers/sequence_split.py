"""One forward and backward of a tiny model whose sequences are split over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.config import AcceleratorConfig, FSDPConfig, OpsImplementationConfig
from omnilit.models.sequence import layout_of
from omnilit.parallel.collectives import sum_over
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.sequence import split_sequence
from omnilit.types import IGNORE, MicroBatch
from tests.helpers.gradients import Deviation, compare, gradients_of
from tests.helpers.models import packed_batch, reference_loss, tiny
from tests.helpers.spread import CPU, spread

Result = tuple[float, dict[str, Tensor]]
# Odd lengths, a segment of one token, some that cross from part to part; 47 and 45 tokens
ROWS = ((5, 1, 30, 9, 2), (33, 2, 10))


@dataclass(frozen=True)
class Case:
    """A model, and how its sequences are split.

    Args:
        family: Of `tests.helpers.models`.
        sizes: Fields of `AcceleratorConfig`.
        over: Fields of the model's configuration.
        attention: Backend of the attention.
        is_ddp: Every rank holds the whole model.
        recompute: Blocks are computed again in backward.
        is_bare: The ranks of the row's last two thirds hold no label.
    """

    family: str
    sizes: dict[str, Any]
    over: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    is_ddp: bool = False
    recompute: bool = False
    is_bare: bool = False

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in (self.sizes | self.over).items()]
        flags = [n for n in ("is_ddp", "recompute", "is_bare") if getattr(self, n)]
        return ", ".join([self.family, *parts, self.attention, *flags])

    @property
    def accelerator(self) -> AcceleratorConfig:
        """The whole group."""
        fsdp = FSDPConfig(fsdp_mode="ddp" if self.is_ddp else "fsdp2")
        return AcceleratorConfig(**self.sizes, fsdp_config=fsdp)

    def batches(self, data_size: int) -> list[MicroBatch]:
        """One micro-batch a data rank."""
        rows = [packed_batch(ROWS[rank], seed=rank) for rank in range(data_size)]
        for row in rows if self.is_bare else ():
            row.labels[:, row.bounds[-1] // 3 :] = IGNORE
        return rows


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """The loss over all ranks and the whole gradients of each case; every rank calls."""
    return [_run(case) for case in cases]


def run_broken(cases: Sequence[tuple[Case, str, Any]]) -> list[Result]:
    """`run_cases`, each with something of ours replaced: a dotted name, and by what."""
    results = []
    for case, target, other in cases:
        with mock.patch(target, other):
            results.append(_run(case))
    return results


def _run(case: Case) -> Result:
    sizes = ParallelSizes.of(case.accelerator).resolve(dist.get_world_size())
    topology = Topology.build(sizes, CPU)
    with _warnings_are_errors():
        model = tiny(case.family, **case.over)
        loss = _backward(model, case, topology)
    return sum_over({"loss": loss})["loss"], gradients_of(model)


@contextmanager
def _warnings_are_errors() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def _backward(model: PreTrainedModel, case: Case, topology: Topology) -> float:
    binding = spread(
        model,
        topology,
        ops=OpsImplementationConfig(attn_implementation=case.attention),
        accelerator=case.accelerator,
        recompute=case.recompute,
    )
    rows = case.batches(topology.data_size)
    part = split_sequence(rows[topology.data_rank], layout_of(topology), topology.sequence_rank)
    loss = binding.head.forward(model, part).token_losses.sum() / _count(rows)
    loss.backward()
    binding.verify_called()
    return loss.item()


def expected(case: Case, data_size: int) -> Result:
    """The same by transformers alone, a sequence at a time, in one process."""
    model, rows = tiny(case.family, **case.over), case.batches(data_size)
    sums = [reference_loss(model, row) * row.counts["tokens"] for row in rows]
    loss = torch.stack(sums).sum() / _count(rows)
    loss.backward()
    return loss.item(), gradients_of(model)


def check(found: Result, case: Case, num_ranks: int, *, rtol: float = 1e-5) -> Deviation:
    """Loss within 1e-5 and every gradient within `rtol` of its largest entry.

    Raises:
        AssertionError: With the case's name.
    """
    sharing = case.sizes.get("ulysses_size", 1) * case.sizes.get("cp_size", 1)
    loss, gradients = expected(case, num_ranks // sharing)
    assert abs(found[0] / loss - 1) < 1e-5, f"{case}: loss {found[0]}, not {loss}"
    try:
        return compare(found[1], gradients, rtol=rtol)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


def _count(rows: Sequence[MicroBatch]) -> int:
    return sum(int((row.labels != IGNORE).sum()) for row in rows)
