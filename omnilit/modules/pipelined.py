"""A model in the stages of a pipeline: which micro-batch each of them works on, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from omnilit.config import AcceleratorConfig
from omnilit.config.pipeline_rules import BATCH, dealing_problem
from omnilit.errors import ConfigError, OmniError
from omnilit.logging import get_logger
from omnilit.models.bind import Binding
from omnilit.models.blocks import decoder_blocks
from omnilit.models.stages import StageRange, check_cut, cut_model, own_stages
from omnilit.parallel.collectives import share_from, sum_over
from omnilit.parallel.fsdp import set_gradient_sync, set_resharding
from omnilit.parallel.mesh import Topology
from omnilit.parallel.pipeline import Pipeline, Wire
from omnilit.types import MicroBatch, StepWindow

log = get_logger(__name__)
T = TypeVar("T")
OnLast = Callable[[MicroBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One stage of this rank.

    Args:
        model: With identities for what other stages own.
        layers: Which of the model's layers it has.
    """

    model: PreTrainedModel
    layers: StageRange


def cut_into_parts(
    model: PreTrainedModel, topology: Topology, config: AcceleratorConfig
) -> list[Part]:
    """Leave of a model what this rank's stages need, in place; nothing where there is one stage.

    Raises:
        ConfigError: The model cannot be cut.
    """
    size = topology.sizes.pp_size
    if size == 1:
        return []
    stages = own_stages(
        topology.pp_rank,
        size=size,
        num_stages=size * config.pp_stages_per_rank,
        num_layers=len(decoder_blocks(model)),
    )
    check_cut(model)
    parts = list(map(Part, cut_model(model, stages), stages))
    shown = ", ".join(f"{s.start} to {s.stop - 1}" for s in stages)
    log.info("pipeline: of %d stages this rank has layers %s", stages[0].num_stages, shown)
    return parts


def output_policy(policy: MixedPrecisionPolicy, parts: Sequence[Part]) -> MixedPrecisionPolicy:
    """A model's policy on this rank: where the last stage is not, no output is the model's."""
    if not parts or parts[-1].layers.is_last:
        return policy
    return replace(policy, output_dtype=None)


class PipelinedModel:
    """Runs a model whose stages are on several ranks; all of them call alike.

    Args:
        parts: Of this rank.
        binding: What is bound to them.
        topology: Its `pp` mesh holds the others' ranks.
        config: The schedule, and when gradients are reduced.
        dtype: Of the hidden states.
        saving: Makes the context of a forward pass that backward will follow.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        binding: Binding,
        topology: Topology,
        config: AcceleratorConfig,
        dtype: torch.dtype,
        saving: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.parts = list(parts)
        self._binding = binding
        self._dtype = dtype
        self._saving = saving
        self._fsdp = config.fsdp_config
        self._schedule = config.pp_schedule
        self._batches: tuple[MicroBatch, ...] = ()
        self._on_last: OnLast | None = None
        self._running: tuple[MicroBatch, Sequence[Tensor]] | None = None
        self._pipeline = Pipeline(
            {part.layers.number: _PartStage(self, part) for part in parts},
            num_stages=parts[0].layers.num_stages,
            group=topology.pp.get_group(),
            schedule=config.pp_schedule,
            device=topology.device,
        )

    @property
    def group(self) -> ProcessGroup:
        """The ranks that hold the other stages."""
        return self._pipeline.group

    def from_last(self, value: T) -> T:
        """What the rank with the last stage has, on every rank; all of them call."""
        return share_from(self.group.size() - 1, value, self.group, self._pipeline.device)

    def add_up(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values summed over the stages' ranks; all of them call."""
        return sum_over(values, self.group, self._pipeline.device)

    @property
    def models(self) -> list[PreTrainedModel]:
        """The stages of this rank."""
        return [part.model for part in self.parts]

    @property
    def has_last(self) -> bool:
        """Whether losses come out on this rank."""
        return self._pipeline.has_last

    @property
    def last_model(self) -> PreTrainedModel:
        """The last stage."""
        assert self.has_last, "the last stage is on another rank"
        return self.parts[-1].model

    def states_of(self, batch: MicroBatch) -> Sequence[Tensor]:
        """What the stages before the last one came to for a micro-batch, while it runs.

        Args:
            batch: The one that `loss_of` was given, or one of the same tokens.

        Raises:
            OmniError: It is another one, which those stages have not seen.
        """
        if self._running is not None:
            running, states = self._running
            if batch.input_ids is running.input_ids and batch.bounds == running.bounds:
                return states
        raise OmniError(
            "in a pipeline the model runs on the tokens of the micro-batch that loss_terms is "
            "given, and on no others: the stages before the last one have not seen them"
        )

    def train(self, window: StepWindow, loss_of: OnLast) -> Tensor:
        """Forward and backward of a whole step; gradients are added up and then reduced.

        Args:
            window: On the model's device; rows of one length.
            loss_of: The loss of a micro-batch, called where the last stage is.

        Returns:
            The step's loss of this pipeline, the same on all ranks of it.

        Raises:
            ConfigError: The schedule takes another number of micro-batches.
            OmniError: The rows differ in length.
        """
        lengths = {batch.input_ids.shape[1] for batch in window}
        if len(lengths) > 1:
            raise OmniError(
                f"micro-batches of a step have rows of {sorted(lengths)} tokens, and a pipeline "
                "takes rows of one length: let the data's collator fill them"
            )
        problem = dealing_problem(
            self._schedule, num_micro_batches=len(window), size=self.group.size()
        )
        if problem is not None:
            raise ConfigError(key=BATCH, problem=problem, fix="give a step more micro-batches")
        self._batches, self._on_last = window.micro_batches, loss_of
        try:
            rows = torch.cat([batch.input_ids for batch in window])
            return self._pipeline.train(rows, self._wire(window.micro_batches[0]))
        finally:
            self._batches, self._on_last = (), None

    def evaluate(self, batch: MicroBatch, on_last: OnLast) -> None:
        """Forward of one micro-batch.

        Args:
            batch: On the model's device.
            on_last: Called where the last stage is.
        """
        self._batches, self._on_last = (batch,), on_last
        try:
            self._pipeline.evaluate(batch.input_ids, 0, self._wire(batch))
        finally:
            self._batches, self._on_last = (), None

    def run(self, part: Part, inputs: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
        """One micro-batch through one stage; see `parallel.pipeline.Stage`."""
        batch = self._batches[number]
        states = () if part.layers.is_first else inputs
        with self._saving():
            if not part.layers.is_last:
                return self._binding.pass_on(part.model, batch, states)
            assert self._on_last is not None
            self._running = batch, states
            try:
                return (self._on_last(batch).reshape(1).clone(),)  # torch detaches it in place
            finally:
                self._running = None

    def before_backward(self, part: Part, *, is_last: bool) -> None:
        """Reduce gradients behind the stage's last backward pass of a step, or behind each."""
        set_gradient_sync(part.model, is_on=is_last or self._fsdp.sync_each_micro_batch)
        set_resharding(part.model, is_on=is_last or self._fsdp.reshard_after_backward)

    def _wire(self, batch: MicroBatch) -> Wire:
        hidden = self.parts[0].model.config.get_text_config().hidden_size
        shapes: list[tuple[int, ...]] = [(1, batch.input_ids.shape[1], hidden)]
        dtypes = [self._dtype]
        if (balance := self._binding.balance) is not None:
            shapes.append((2 * balance.num_experts + 1,))
            dtypes.append(torch.float32)
        return Wire(tuple(shapes), tuple(dtypes))


@dataclass(frozen=True, slots=True)
class _PartStage:
    """A part as the stage of a pipeline."""

    owner: PipelinedModel
    part: Part

    def run(self, inputs: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
        return self.owner.run(self.part, inputs, number)

    def before_backward(self, *, is_last: bool) -> None:
        self.owner.before_backward(self.part, is_last=is_last)
