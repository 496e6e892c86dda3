"""Pipeline parallelism: the stages of one rank, run in the order of one of torch's schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from typing_extensions import override

from omnilit.config.pipeline_rules import INTERLEAVED
from omnilit.errors import OmniError

Schedule: TypeAlias = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B


class Stage(Protocol):
    """A part of a model that computes on this rank."""

    def run(self, inputs: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
        """Compute one micro-batch.

        Args:
            inputs: What the stage before gave; token ids [1, T] for the first one.
            number: Which micro-batch of the step.

        Returns:
            What the next stage takes; of the last one the loss, [1].
        """
        ...

    def before_backward(self, *, is_last: bool) -> None:
        """Make ready for the backward pass of a micro-batch.

        Args:
            is_last: Of the step's, for this stage.
        """
        ...


@dataclass(frozen=True, slots=True)
class Wire:
    """The tensors that go from each stage to the next, of one micro-batch.

    Args:
        shapes: One a tensor; each has a gradient that comes back.
        dtypes: As many.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def make(self, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors like them, values undefined."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in sizes)

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Refuse what the next stage does not expect, before it is sent.

        Raises:
            OmniError: A shape or type differs.
        """
        found = [(tuple(one.shape), one.dtype) for one in outputs]
        wanted = list(zip(self.shapes, self.dtypes, strict=True))
        if found != wanted:
            raise OmniError(f"a pipeline stage gave {found}, and the next one expects {wanted}")


class Pipeline:
    """Runs the stages of this rank, together with the ranks that hold the others.

    Stage `s` of `num_stages` is on rank `s % group.size()` of the group.

    Args:
        stages: Those of this rank, by number.
        num_stages: On all ranks.
        group: One rank of each pipeline position.
        schedule: `1f1b`, `gpipe`, or `interleaved` for several stages a rank.
        device: This rank's.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        num_stages: int,
        group: ProcessGroup,
        schedule: str,
        device: torch.device,
    ) -> None:
        self.stages = dict(stages)
        self.num_stages = num_stages
        self.group = group
        self.device = device
        self._schedule = schedule
        self._ready: tuple[object, Schedule] | None = None

    @property
    def has_first(self) -> bool:
        """Whether token ids go in here."""
        return 0 in self.stages

    @property
    def has_last(self) -> bool:
        """Whether losses come out here."""
        return self.num_stages - 1 in self.stages

    def train(self, input_ids: Tensor, wire: Wire) -> Tensor:
        """Forward and backward of all micro-batches of a step; gradients are added up.

        Args:
            input_ids: Of the micro-batches, [M, T].
            wire: What goes between stages.

        Returns:
            The sum of the micro-batches' losses, the same on all ranks of the group.
        """
        numbers = torch.arange(len(input_ids))
        schedule = self._make_ready(input_ids, wire)
        losses: list[Tensor] = []
        given = (input_ids,) if self.has_first else ()
        result = {"target": numbers, "losses": losses} if self.has_last else {}
        try:
            schedule.step(*given, number=numbers, return_outputs=False, **result)
        except RuntimeError as error:  # torch's, around what a stage raised
            if isinstance(error.__cause__, OmniError):
                raise error.__cause__ from None
            raise
        total = torch.zeros((), device=self.device)
        if self.has_last:
            total += torch.stack([loss.detach() for loss in losses]).sum()  # of any type
        return self.from_last(total)

    def evaluate(self, input_ids: Tensor, number: int, wire: Wire) -> None:
        """Forward of one micro-batch, stage after stage; the last one keeps what it finds.

        Args:
            input_ids: [1, T].
            number: What the stages are told.
            wire: What goes between stages.
        """
        size, rank = self.group.size(), self.group.rank()
        states: tuple[Tensor, ...] = (input_ids,)
        for stage in sorted(self.stages):
            if stage > 0:
                states = wire.make(self.device)
                for state in states:
                    dist.recv(state, group_src=(rank - 1) % size, group=self.group)
            states = self.stages[stage].run(states, number)
            if stage < self.num_stages - 1:
                wire.check(states)
                for state in states:
                    dist.send(state.contiguous(), group_dst=(rank + 1) % size, group=self.group)

    def from_last(self, values: Tensor) -> Tensor:
        """The values of the rank with the last stage, on every rank; changed in place."""
        dist.broadcast(values, group_src=self.group.size() - 1, group=self.group)
        return values

    def _make_ready(self, input_ids: Tensor, wire: Wire) -> Schedule:
        """The schedule for micro-batches of this number and shape; the last one is kept."""
        key = (tuple(input_ids.shape), wire)
        if self._ready is None or self._ready[0] != key:
            self._ready = (key, self._build(input_ids, wire))
        return self._ready[1]

    def _build(self, input_ids: Tensor, wire: Wire) -> Schedule:
        between = tuple(state.requires_grad_() for state in wire.make(self.device))
        loss = torch.zeros(1, device=self.device, requires_grad=True)
        stages = [
            _TorchStage(
                _Runner(self.stages[number], None if number == self.num_stages - 1 else wire),
                number,
                self.num_stages,
                self.device,
                input_args=(input_ids[:1],) if number == 0 else between,
                output_args=(loss,) if number == self.num_stages - 1 else between,
                group=self.group,
            )
            for number in sorted(self.stages)
        ]
        settings = {"loss_fn": _loss_of, "scale_grads": False}
        if self._schedule == INTERLEAVED:
            return ScheduleInterleaved1F1B([*stages], len(input_ids), **settings)
        kind = ScheduleGPipe if self._schedule == "gpipe" else Schedule1F1B
        (stage,) = stages
        return kind(stage, len(input_ids), **settings)


class _Runner(nn.Module):
    """A stage as the module that torch's schedules call."""

    def __init__(self, stage: Stage, wire: Wire | None) -> None:
        super().__init__()
        self.stage = stage
        self._wire = wire

    @override
    def forward(self, *inputs: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        outputs = self.stage.run(inputs, int(number))
        if self._wire is not None:
            self._wire.check(outputs)
        return outputs


class _TorchStage(PipelineStage):
    """A stage that says to its module which backward pass is the last one."""

    @override
    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        assert isinstance(self.submod, _Runner)
        self.submod.stage.before_backward(is_last=last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)


def _loss_of(output: tuple[Tensor, ...], _number: Tensor) -> Tensor:
    return output[0].sum()
