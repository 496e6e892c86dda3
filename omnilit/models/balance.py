"""The router's balance loss of a micro-batch, from the logits of every layer's router."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from omnilit.errors import ConfigError
from omnilit.kernels import load_balancing
from omnilit.kernels.slot import Kernel
from omnilit.models.calls import CallCounter
from omnilit.models.class_labels import is_classifier
from omnilit.models.fit import ModelNumbers
from omnilit.types import IGNORE, MicroBatch

FIELD: Final = "load_balancing_loss_implementation"
_KEY: Final = "model.config_path"


class RouterBalance:
    """Takes the routers' logits out of a forward, and makes the loss of them.

    The model would make it itself, but of this rank's tokens alone, with padding among them, and
    through a one-hot tensor of all choices.

    Args:
        kernel: Backend of the slot `load_balancing_loss`.
        num_experts: Of a layer.
        top_k: Experts that a token is sent to.
        coefficient: Weight of the loss beside that of the tokens.
        counter: Counts the kernel's calls until the first step is checked.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        num_experts: int,
        top_k: int,
        coefficient: float,
        counter: CallCounter,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.coefficient = coefficient
        self._kernel = kernel
        self._counter = counter
        self._is_listening = False
        self._logits: tuple[Tensor, ...] = ()

    @classmethod
    def bind(cls, model: PreTrainedModel, kernel: Kernel, *, counter: CallCounter) -> RouterBalance:
        """Listen to this instance's routers, and to no other's.

        Args:
            model: Its configuration asks for the routers' logits.
            kernel: Backend of the slot `load_balancing_loss`.
            counter: Where to count the kernel's calls.

        Raises:
            ConfigError: The model's own code makes no such loss, or its configuration does not say
                how many experts a token is sent to.
        """
        name = type(model).__name__
        if not _makes_loss(model):
            raise ConfigError(
                key=_KEY,
                problem=f"output_router_logits: true has no effect, because {name} makes no "
                "balance loss of them",
                fix="take it out of the model's configuration",
            )
        config = model.config.get_text_config()
        top_k = getattr(config, "num_experts_per_tok", None)
        if top_k is None:
            raise ConfigError(
                key=_KEY,
                problem=f"{name} asks for output_router_logits without a num_experts_per_tok",
                fix="set output_router_logits: false in its configuration",
            )
        balance = cls(
            kernel,
            num_experts=ModelNumbers.of(model.config).experts,
            top_k=top_k,
            coefficient=getattr(config, "router_aux_loss_coef", 0.0),
            counter=counter,
        )

        def take(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if balance._is_listening and getattr(output, "router_logits", None):
                balance._logits, output.router_logits = output.router_logits, None

        model.base_model.register_forward_hook(take)
        return balance

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the logits of the forward in here; outside, the model is as ever."""
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """A forward in here makes no balance loss, nor does the model."""
        with self.listening():
            yield
        self._logits = ()

    def add_up(self, batch: MicroBatch, before: Tensor | None = None) -> Tensor:
        """What the routers that were listened to add to the loss of a pipeline's last stage.

        Args:
            batch: The micro-batch, or this rank's part of it.
            before: The same of the stages before.

        Returns:
            The sums up to here, [2 E + 1]; see `load_balancing.eager`.
        """
        logits, self._logits = self._logits, ()
        if logits:
            self._counter.add(FIELD)
            own = self._kernel(
                logits, num_experts=self.num_experts, top_k=self.top_k, is_real=batch.is_real
            )
        else:  # a stage without experts; its sums have a gradient like all others
            own = torch.zeros(
                2 * self.num_experts + 1, device=batch.labels.device, requires_grad=True
            )
        return own if before is None else before + own

    def weigh(
        self,
        batch: MicroBatch,
        group: ProcessGroup | None = None,
        *,
        before: Tensor | None = None,
    ) -> Tensor:
        """This rank's share of the loss of the micro-batch whose forward was listened to.

        It counts once a supervised token of the micro-batch, so that in the mean over a step's
        tokens it enters with the micro-batch's share of them.

        Args:
            batch: The micro-batch, or this rank's part of it.
            group: The ranks that hold its parts; None where this rank holds all of it.
            before: What `add_up` gave on the stages before, where this is a pipeline's last.

        Returns:
            A scalar; the shares of `group` add up to the whole, and so do their gradients.
        """
        sums = self.add_up(batch, before)
        loss = load_balancing.of_sums(sums, num_experts=self.num_experts, group=group)
        num_targets = (batch.labels != IGNORE).sum()
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(num_targets, group=group)
        return self.coefficient * num_targets * loss


def _makes_loss(model: PreTrainedModel) -> bool:
    """Whether the model's own forward makes a balance loss; some families only hand logits out.

    Of a classifier that of its language model counts: what it says goes for the same layers.
    """
    kind: Any = type(model)
    if is_classifier(model.config):
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), kind)
    code = inspect.unwrap(kind.forward).__code__
    return "aux_loss" in code.co_varnames
