"""A classifier's head: logits of the last token of each sequence, and of no other."""

# T packed tokens, R of them with a label, H hidden, C classes

from __future__ import annotations

import copy
from types import MethodType
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from typing_extensions import override

from omnilit.errors import ConfigError
from omnilit.losses.classification import class_losses
from omnilit.models.attention import PackedRun
from omnilit.models.class_labels import CONFIG_KEY
from omnilit.models.head import ForwardOutput, check_coefficient, first_position, run_packed
from omnilit.models.head_form import Setting
from omnilit.models.heads import class_head_name
from omnilit.types import IGNORE, MicroBatch

# Without it, transformers takes the last place of a row of one sequence, be it padding or not
PADDING: Final = Setting(("config", "get_text_config()"), "pad_token_id")
FAILURES: Final = (
    *(AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


class ClassHead:
    """Runs a classifier on packed rows, whose head it gives the tokens that have a label.

    transformers takes the logits of one place of a row: that of its last token that is no padding.
    While a packed row runs, the head puts all logits that are wanted into one place, the last.
    Outside `forward` the model is as ever.

    Args:
        run: Where packed rows are announced to the model's attention.
        first_position: The number of a sequence's first token; see `models.head`.
    """

    def __init__(self, run: PackedRun, *, first_position: int) -> None:
        self._run = run
        self._first_position = first_position
        self._positions: Tensor | None = None

    @classmethod
    def bind(cls, model: PreTrainedModel, *, run: PackedRun) -> ClassHead:
        """Replace the forward of this instance's head, and of no other.

        Args:
            model: A classifier on any device.
            run: Where packed rows are announced.

        Raises:
            ConfigError: The model does not classify by a linear layer on one token.
        """
        check_coefficient(model)
        name = class_head_name(model)
        if name is None or not cls._takes_last_place(model, name):
            raise ConfigError(
                key=CONFIG_KEY,
                problem=f"{type(model).__name__} does not classify a text by a linear layer on "
                "its last token",
                fix="choose a model that reads from left to right, such as one of Qwen3, Llama or "
                "Gemma",
            )
        own = cls(run, first_position=first_position(model))
        own._attach(model.get_submodule(name))
        return own

    def forward(
        self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None = None
    ) -> ForwardOutput:
        """Run the whole model, also where nothing has a label, so that ranks stay in step.

        Args:
            model: The model that this was bound to, sharded or not.
            batch: On the model's device.
            hidden: What the stages before came to, [1, T, H], where this is a pipeline's last.
        """
        self._positions = (batch.labels[0] != IGNORE).nonzero()[:, 0]
        labels = batch.labels[0, self._positions]
        try:
            logits_RC = self._call(model, batch, hidden)[0].float()
        finally:
            self._positions = None
        return ForwardOutput(class_losses(logits_RC, labels), class_logits=logits_RC)

    def pass_on(
        self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None = None
    ) -> Tensor:
        """Run a stage of a pipeline that is not its last; returns hidden states [1, T, H]."""
        return self._call(model, batch, hidden)

    def _call(self, model: PreTrainedModel, batch: MicroBatch, hidden: Tensor | None) -> Tensor:
        with PADDING.replaced(model, None):
            return run_packed(
                model, batch, hidden, run=self._run, first_position=self._first_position
            )

    @classmethod
    def _takes_last_place(cls, model: PreTrainedModel, name: str) -> bool:
        """Whether a model's own code hands on what its head puts into the last place, measured."""
        hidden, positions = torch.arange(20.0).view(1, 5, 4), torch.tensor([1, 4])
        num_labels = model.get_submodule(name).get_parameter("weight").shape[0]
        head = nn.Linear(4, num_labels, bias=False, device="meta")
        head.weight = nn.Parameter(torch.arange(4.0 * num_labels).view(num_labels, 4))
        twin = copy.copy(model)
        vars(twin)["_modules"] = dict(model.named_children())
        twin.add_module(model.base_model_prefix, _Body(hidden))
        twin.add_module(name, head)
        probe = cls(PackedRun(), first_position=0)
        probe._attach(head)
        probe._positions = positions
        try:
            with torch.no_grad(), PADDING.replaced(twin, None):
                row = torch.zeros(1, hidden.shape[1], dtype=torch.int64)
                found = twin(input_ids=row, use_cache=False).logits
        except FAILURES:  # whatever a family's own code does with what it did not expect
            return False
        expected = linear(hidden[:, positions], head.weight)
        return found.shape == expected.shape and torch.equal(found, expected)

    def _attach(self, head: nn.Module) -> None:
        own = self

        def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
            return own._run_head(self, hidden)

        head.forward = MethodType(forward, head)

    def _run_head(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Logits as usual, or those of the wanted tokens in one place: [1, 1, R, C]."""
        if self._positions is None:
            return linear(hidden, head.weight, head.bias)
        logits_RC = linear(hidden[0, self._positions], head.weight, head.bias)
        return logits_RC[None, None].clone()  # FSDP2 warns of a view as its unit's output


class LastPlace(nn.Module):
    """In place of a classifier's head on a stage without one: all hidden states in one place."""

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, None].clone()


class _Body(nn.Module):
    """Gives the hidden states that it was made with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @override
    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)  # pyright: ignore[reportArgumentType]
