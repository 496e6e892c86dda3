"""Mechanisms of parallel training that do not work, on purpose: what a comparison has to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from omnilit.models import attention
from omnilit.modules import datamodule
from omnilit.parallel import grad_norm
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
        patch.setattr(datamodule._Reducer, "__call__", own)
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


@dataclass(frozen=True)
class Broken:
    """A mechanism that does not work, and where that shows.

    Args:
        name: What is wrong.
        layout: Where.
        broken: Makes the context in which it is.
        noticed: In what the comparison says.
    """

    name: str
    layout: Layout
    broken: Callable[[], AbstractContextManager[None]]
    noticed: str


BROKEN = (
    Broken("segments leak", ALONE, leaking_segments, "tensors are off"),
    Broken("gradients are means", FSDP, mean_gradients, "tensors are off"),
    Broken("gradients are means of copies", DDP_2, mean_gradients, "tensors are off"),
    Broken("counts are local", FSDP, local_counts, "tensors are off"),
    Broken("the norm is local", FSDP, local_norm, "stories"),
)
