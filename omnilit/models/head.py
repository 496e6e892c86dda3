"""The head is the loss: no logit is computed for a token that is not supervised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any, Final

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import linear
from transformers import PreTrainedModel

from omnilit.errors import ConfigError
from omnilit.kernels.cross_entropy import HeadKernel, chunk_loss
from omnilit.models.attention import BOUNDS, PackedRun, Segments
from omnilit.models.calls import CallCounter
from omnilit.models.head_form import HeadForm, read_head
from omnilit.models.media.feed import MediaFeed
from omnilit.parallel.local import local_part
from omnilit.parallel.vocabulary import VocabularyShards
from omnilit.types import IGNORE, MicroBatch

FIELD: Final = "cross_entropy_loss_implementation"


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What one forward over a packed micro-batch yields.

    Args:
        token_losses: Negative log-likelihood of every supervised token, float32, in their order.
        balance: This rank's share of the router's balance loss, weighted by its coefficient and
            the micro-batch's supervised tokens, where the model's configuration asks for it.
        class_logits: Of a classifier, of every sequence whose label is here, float32 [R, C].
    """

    token_losses: Tensor
    balance: Tensor | None = None
    class_logits: Tensor | None = None


class HeadLoss:
    """Runs a model whose `lm_head` computes losses while, and only while, we ask it to.

    Outside `forward` the head gives logits as ever, so generation needs nothing special. The
    kernel runs inside `lm_head.__call__`, where FSDP2 has gathered the weight, also a tied one.

    Args:
        kernel: Backend of the slot `cross_entropy_loss`.
        form: What the model does to its logits; done here in its place.
        counter: Counts the kernel's calls until the first step is checked.
        run: Where packed rows are announced to the model's attention.
        media: Gives the model what its rows have beside tokens, where it takes such.
    """

    def __init__(
        self,
        kernel: HeadKernel,
        *,
        form: HeadForm,
        counter: CallCounter,
        run: PackedRun,
        media: MediaFeed | None = None,
    ) -> None:
        self._kernel = kernel
        self._form = form
        self._counter = counter
        self._run = run
        self._media = media
        self._positions: Tensor | None = None
        self._targets: Tensor | None = None
        self._softcap: float | None = None
        self._factor = 1.0
        self._first_position = 0

    @classmethod
    def bind(
        cls,
        model: PreTrainedModel,
        kernel: HeadKernel,
        *,
        counter: CallCounter,
        run: PackedRun,
        media: MediaFeed | None = None,
    ) -> HeadLoss:
        """Replace the forward of this instance's head, and of no other.

        Raises:
            ConfigError: The model does something to its logits that the kernel cannot do, its
                head is no linear layer, or its balance loss has no coefficient.
        """
        head = model.get_output_embeddings()
        name = next((n for n, module in model.named_modules() if module is head), None)
        if name is None or type(head) is not nn.Linear:
            raise ConfigError(
                key="model.config_path",
                problem=f"the output embeddings of {type(model).__name__} are "
                f"{type(head).__name__}, not a linear layer",
                fix="choose an architecture with a plain lm_head",
            )
        check_coefficient(model)
        form = read_head(model, name, may_pick=media is not None)
        loss = cls(kernel, form=form, counter=counter, run=run, media=media)
        loss._first_position = first_position(model)

        def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
            return loss._run_head(self, hidden)

        head.forward = MethodType(forward, head)
        return loss

    def forward(
        self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None = None
    ) -> ForwardOutput:
        """Run the whole model, also where nothing is supervised, so that ranks stay in step.

        Args:
            model: The model that this was bound to, sharded or not.
            batch: On the model's device.
            hidden: What the stages before came to, [1, T, H], where this is a pipeline's last.
        """
        positions = (batch.labels[0] != IGNORE).nonzero()[:, 0]
        self._targets = batch.labels[0, positions]
        try:
            with self._kept(positions) as kept:
                losses = self._call(model, batch, hidden, **kept)
        finally:
            self._targets = None
        return ForwardOutput(losses.reshape(-1).float())  # output_dtype may have cast them

    def pass_on(
        self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None = None
    ) -> Tensor:
        """Run a stage of a pipeline that is not its last: a model with an identity for its head.

        Returns:
            The hidden states [1, T, H] for the next stage.
        """
        return self._call(model, batch, hidden)

    def next_logits(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        positions: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """What the model says of the tokens behind some positions, as it does in generation.

        Args:
            model: The model that this was bound to, sharded or not.
            batch: On the model's device.
            positions: Places in the row here, int64 [R]; R may be 0.
            hidden: See `forward`.

        Returns:
            Logits [R, V].
        """
        with self._kept(positions) as kept:
            return self._run_model(model, batch, hidden, **kept)[0]

    @contextmanager
    def _kept(self, positions: Tensor) -> Iterator[dict[str, Tensor]]:
        """What tells the model where logits are wanted; of one that takes no word, the head."""
        if not self._form.picks:
            yield {"logits_to_keep": positions}
            return
        self._positions = positions
        try:
            yield {}
        finally:
            self._positions = None

    def _call(
        self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None, **more: Tensor
    ) -> Tensor:
        with self._settings_taken(model):
            return self._run_model(model, batch, hidden, **more)

    def _run_model(
        self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None, **more: Tensor
    ) -> Tensor:
        feeding = nullcontext({}) if self._media is None else self._media.feeding(batch)
        with feeding as fed:
            given = {**fed, **more}
            return run_packed(
                model, batch, hidden, given, run=self._run, first_position=self._first_position
            )

    @contextmanager
    def _settings_taken(self, model: PreTrainedModel) -> Iterator[None]:
        """Move factor and cap from the model into what runs here.

        The model reads them from its configuration; they are put back before anyone exports it.
        """
        softcap = self._form.softcap
        self._softcap = None if softcap is None else softcap.value(model)
        self._factor = self._form.factor(model)
        with self._form.taken_out(model):
            yield

    def _run_head(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Logits as usual, or the losses [1, R, 1] in their place while targets are set."""
        weight, bias, kernel = head.weight, head.bias, self._kernel
        if self._positions is not None:  # a model that would compute all logits
            hidden = hidden[:, self._positions]
        is_split = isinstance(weight, DTensor)
        if self._targets is None:
            return split_logits(hidden, weight, bias) if is_split else linear(hidden, weight, bias)
        if is_split:
            kernel = partial(chunk_loss, parts=VocabularyShards.of(weight))
            weight = weight.to_local()
            bias = None if bias is None else local_part(bias)
        self._counter.add(FIELD)
        if self._factor != 1.0:
            hidden, bias = hidden * self._factor, None if bias is None else bias * self._factor
        losses_R = kernel(
            hidden.flatten(0, -2), weight, self._targets, bias_V=bias, softcap=self._softcap
        )
        return losses_R[None, :, None].clone()  # FSDP2 warns of a view as its unit's output


def run_packed(
    model: PreTrainedModel,
    batch: MicroBatch,
    hidden: Tensor | None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    run: PackedRun,
    first_position: int,
) -> Tensor:
    """What a model, or a stage of one, gives for a packed row in place of logits.

    Args:
        model: Its attention was bound.
        batch: On the model's device.
        hidden: What the stages before came to, [1, T, H]; None where this is the first.
        more: Further arguments of the model's forward; they come before those made here.
        run: Where packed rows are announced to the model's attention.
        first_position: The number of a sequence's first token.
    """
    given = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden}
    given["position_ids"] = batch.position_ids + first_position
    with run.going_on():
        bounds = {BOUNDS: Segments(batch.bounds)}
        return model(**{**given, **more}, **bounds, use_cache=False).logits


def first_position(model: nn.Module) -> int:
    """The number of a sequence's first token among the positions that the model learns.

    RoBERTa and its relatives keep a row of their table for padding, and count from behind it on.
    """
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            padding: Any = module.padding_idx
            return padding + 1
    return 0


def split_logits(hidden: Tensor, weight: DTensor, bias: Tensor | None) -> Tensor:
    """The logits of a head whose rows are spread over ranks, gathered: for generation."""
    mesh = weight.device_mesh
    spread = linear(DTensor.from_local(hidden, mesh, [Replicate()]), weight, bias)
    assert isinstance(spread, DTensor)
    return spread.full_tensor()


def check_coefficient(model: PreTrainedModel) -> None:
    """Refuse a model that asks for the router's balance loss and does not say how much it weighs.

    Raises:
        ConfigError: It does so.
    """
    config = model.config.get_text_config()
    has_aux = getattr(config, "output_router_logits", False)
    if has_aux and not hasattr(config, "router_aux_loss_coef"):
        raise ConfigError(
            key="model.config_path",
            problem=f"{type(model).__name__} asks for output_router_logits without a "
            "router_aux_loss_coef",
            fix="add router_aux_loss_coef to its configuration, or drop output_router_logits",
        )
