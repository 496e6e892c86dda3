"""Mechanisms of parallel training that do not work, on purpose: what a comparison has to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from omnilit.models import attention, tensor_parallel
from omnilit.models import sequence as model_sequence
from omnilit.models.places import is_experts
from omnilit.modules import base, loaders, pipelined
from omnilit.parallel import grad_norm, sequence
from omnilit.parallel.fsdp import set_gradient_sync
from tests.helpers.layouts import ALONE, DDP_2, FSDP, Layout


@contextmanager
def mean_gradients() -> Iterator[None]:
    """Ranks average gradients in place of adding them: a loss over the step's count needs sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
        yield


@contextmanager
def local_counts() -> Iterator[None]:
    """Each rank divides by its own count of labels."""

    def own(self: Any, counts: Any, error: BaseException | None) -> Any:
        if error is not None:
            raise error
        return counts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders.CountReducer, "__call__", own)
        yield


@contextmanager
def leaking_segments() -> Iterator[None]:
    """Attention takes a packed row for one sequence."""

    def whole(segments: Any, query: Tensor, key: Tensor, num_parts: int) -> tuple[int, int]:
        return 0, query.shape[2] * num_parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_checked_bounds", whole)
        yield


@contextmanager
def local_norm() -> Iterator[None]:
    """Each rank clips by the norm of its own shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_norm, "_sum_over", lambda total, mesh: total)
        yield


@contextmanager
def norm_of_a_stage() -> Iterator[None]:
    """Each stage of a pipeline clips by the norm of its own layers."""
    whole = base.clip_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "clip_gradients", lambda held, norm, stages: whole(held, norm))
        yield


@contextmanager
def stages_reduce_early() -> Iterator[None]:
    """A stage reduces its gradients behind the first backward pass, and none after."""

    def first(self: Any, part: Any, *, is_last: bool) -> None:
        set_gradient_sync(part.model, is_on=not is_last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelined.PipelinedModel, "before_backward", first)
        yield


@contextmanager
def mean_gradients_of_experts() -> Iterator[None]:
    """Ranks that hold the same experts average their gradients."""
    with pytest.MonkeyPatch.context() as patch:
        sharding = FSDPModule.set_gradient_divide_factor

        def dense_alone(self: FSDPModule, factor: float) -> None:
            if not is_experts(cast("nn.Module", self)):
                sharding(self, factor)

        patch.setattr(FSDPModule, "set_gradient_divide_factor", dense_alone)
        yield


@contextmanager
def shares_are_not_summed() -> Iterator[None]:
    """A weight that all ranks of tensor parallelism hold learns from this rank's heads alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_parallel, "sum_gradients", lambda weight, group: weight)
        yield


@contextmanager
def chunks_out_of_order() -> Iterator[None]:
    """Gathered keys and values stand in the order of the ranks, not of the row."""
    with pytest.MonkeyPatch.context() as patch:
        whole = model_sequence.gather_row
        patch.setattr(
            model_sequence,
            "gather_row",
            lambda held, group, order: whole(held, group, sorted(order)),
        )
        yield


@contextmanager
def every_part_counts_the_row() -> Iterator[None]:
    """Each rank that holds a part of a row counts the labels of the whole row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "_count", lambda whole, part, is_first: whole.counts)
        yield


@dataclass(frozen=True)
class Broken:
    """A mechanism that does not work, and where that shows.

    Args:
        name: What is wrong.
        layout: Where.
        broken: Makes the context in which it is.
        noticed: In what the comparison says.
        of: The class whose first member it is held against.
    """

    name: str
    layout: Layout
    broken: Callable[[], AbstractContextManager[None]]
    noticed: str
    of: str = "dense"


PP = Layout("pp 2", 2, {"accelerator": {"pp_size": 2}})
PP_FSDP = Layout("pp 2 x FSDP 2", 4, {"accelerator": {"pp_size": 2}})
EP = Layout("ep 2 x efsdp 2", 4, {"accelerator": {"ep_size": 2}})
TP = Layout("tp 2", 2, {"accelerator": {"tp_size": 2}})
CP = Layout("cp 2", 2, {"accelerator": {"cp_size": 2}})
ULYSSES = Layout("ulysses 2", 2, {"accelerator": {"ulysses_size": 2}})
BROKEN = (
    Broken("segments leak", ALONE, leaking_segments, "tensors are off"),
    Broken("gradients are means", FSDP, mean_gradients, "tensors are off"),
    Broken("gradients are means of copies", DDP_2, mean_gradients, "tensors are off"),
    Broken("counts are local", FSDP, local_counts, "tensors are off"),
    Broken("the norm is local", FSDP, local_norm, "stories"),
    Broken("the norm is of a stage", PP, norm_of_a_stage, "stories"),
    Broken("stages reduce early", PP_FSDP, stages_reduce_early, "tensors are off"),
    Broken("experts' gradients are means", EP, mean_gradients_of_experts, "are off", of="experts"),
    Broken("shares are not summed", TP, shares_are_not_summed, "stories"),
    Broken("chunks are out of order", CP, chunks_out_of_order, "tensors are off"),
    Broken("every part counts the row", ULYSSES, every_part_counts_the_row, "or tokens"),
)
