"""Put the chosen kernels on one model instance; classes and modules are never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from omnilit.errors import KernelError, Problem
from omnilit.kernels.resolve import KernelSet
from omnilit.kernels.slot import Kernel
from omnilit.kernels.slots import SLOTS
from omnilit.models import attention, attention_fit, delta_net, head, places
from omnilit.models import balance as router_balance
from omnilit.models.calls import CallCounter
from omnilit.models.class_head import ClassHead
from omnilit.models.class_labels import is_classifier
from omnilit.models.media.feed import MediaFeed
from omnilit.models.model_mask import sees_ahead
from omnilit.models.namespaces import copy_space, own_forward, rebuild_forward
from omnilit.types import MicroBatch

_MOE: Final = "moe_implementation"
_RMS_NORM: Final = "rms_norm_implementation"
_SWIGLU: Final = "swiglu_mlp_implementation"
_ROTARY: Final = "rotary_pos_emb_implementation"
_NORM_GATED: Final = "rms_norm_gated_implementation"
_DELTA_NET: Final = (delta_net.CONVOLUTION, delta_net.DELTA_RULE)  # bound together, eager too
_BALANCE: Final = router_balance.FIELD


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one slot in one model.

    Args:
        field: Its field of `ops_implementation`.
        backend: What was chosen.
        num_places: Modules of the model that the slot stands for.
        is_bound: Whether our kernel runs there; else it is the model's own code.
        why: How the choice was made.
    """

    field: str
    backend: str
    num_places: int
    is_bound: bool
    why: str


class Binding:
    """The kernels on one model instance.

    Args:
        head: Runs the model with its head as the loss, or on the tokens that it classifies.
        balance: The router's balance loss, where the model's configuration asks for it.
        table: One row a slot.
        counter: What the bound kernels count their calls in.
        media: Gives the model images, videos and sounds, where it takes such.
    """

    def __init__(
        self,
        *,
        head: head.HeadLoss | ClassHead,
        balance: router_balance.RouterBalance | None,
        table: Sequence[Row],
        counter: CallCounter,
        media: MediaFeed | None = None,
    ) -> None:
        self.head = head
        self.balance = balance
        self.media = media
        self.table = tuple(table)
        self._counter = counter

    def forward(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        *,
        sequence: ProcessGroup | None = None,
        states: Sequence[Tensor] = (),
    ) -> head.ForwardOutput:
        """Losses of the supervised tokens, and the router's balance loss where there is one.

        Args:
            model: The model that the kernels were bound to, sharded or not.
            batch: On the model's device.
            sequence: The ranks that hold parts of this micro-batch; None where it is whole here.
            states: What `pass_on` gave on the stage before, where this is a pipeline's last.
        """
        hidden, *sums = states or (None,)
        if self.balance is None:
            return self.head.forward(model, batch, hidden)
        with self.balance.listening():
            output = self.head.forward(model, batch, hidden)
        balance = self.balance.weigh(batch, sequence, before=sums[0] if sums else None)
        return replace(output, balance=balance)

    def next_logits(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        positions: Tensor,
        states: Sequence[Tensor] = (),
    ) -> Tensor:
        """Logits [R, V] of the tokens behind R positions of a row; see `HeadLoss.next_logits`.

        Args:
            model: The model that the kernels were bound to, sharded or not.
            batch: On the model's device.
            positions: Places in the row here, int64 [R].
            states: See `forward`.
        """
        hidden = states[0] if states else None
        assert isinstance(self.head, head.HeadLoss), "a classifier writes no text"
        with nullcontext() if self.balance is None else self.balance.passed_over():
            return self.head.next_logits(model, batch, positions, hidden)

    def pass_on(
        self, model: PreTrainedModel, batch: MicroBatch, states: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """Run a stage of a pipeline that is not its last one.

        Args:
            model: The stage.
            batch: On the model's device.
            states: What the stage before gave; nothing on the first.

        Returns:
            The hidden states and, where there is a balance loss, what the routers up to here add
            to it.
        """
        hidden, *sums = states or (None,)
        if self.balance is None:
            return (self.head.pass_on(model, batch, hidden),)
        with self.balance.listening():
            output = self.head.pass_on(model, batch, hidden)
        return output, self.balance.add_up(batch, sums[0] if sums else None)

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, str, int, str, str]]]:
        """Header and rows of the table that is logged at the start."""
        rows = [
            (SLOTS[row.field].name, row.backend, row.num_places, _what_runs(row), row.why)
            for row in self.table
        ]
        return ("operation", "backend", "places", "runs", "why"), rows

    def verify_called(self, total: Callable[[dict[str, float]], dict[str, float]] = dict) -> None:
        """Check after the first step that what was bound was called, then stop counting.

        Args:
            total: Adds up counts of calls over the ranks that hold the model's other stages, where
                there are any: a kernel may have its places there.

        Raises:
            KernelError: A kernel was bound and the model went past it; all such slots.
        """
        if not self._counter.is_counting:
            return
        calls = total({row.field: float(self._counter.of(row.field)) for row in self.table})
        problems = [
            Problem(
                SLOTS[row.field].key,
                f"{row.backend!r} was bound in {row.num_places} places and never called",
                "set it to eager",
            )
            for row in self.table
            if row.is_bound and not calls[row.field]
        ]
        if problems:
            raise KernelError.of(problems)
        self._counter.stop()


def bind_kernels(
    model: PreTrainedModel, kernels: KernelSet, *, takes_media: bool = False
) -> Binding:
    """Bind every slot of `kernels` that `model` has a place for.

    Call it before parallelism, recompute and compilation, which capture what is bound here. The
    model needs a configuration of its own: attention is chosen through it.

    Args:
        model: Only this instance is changed; on any device, meta included.
        kernels: From `resolve_kernels`.
        takes_media: Rows hold images, videos or sounds beside tokens.

    Raises:
        ConfigError: The model cannot be packed, takes no media in such rows, or its head cannot
            compute the loss.
        KernelError: A backend that was given by name has no place in this model, or cannot do what
            its attention asks.
    """
    has_masks = takes_media and sees_ahead(model)
    kernels = attention_fit.fit_attention(model, kernels, has_masks=has_masks)
    counter, run = CallCounter(), attention.PackedRun()
    found = {field: find(model) for field, find in _FINDERS.items()}
    _refuse_placeless(model, kernels, found)
    num_attention = attention.bind_attention(
        model, kernels.kernel(attention.FIELD), counter, run, has_masks=has_masks
    )
    media = MediaFeed(model) if takes_media else None
    runner = (
        ClassHead.bind(model, run=run)
        if is_classifier(model.config)
        else head.HeadLoss.bind(
            model, kernels.kernel(head.FIELD), counter=counter, run=run, media=media
        )
    )
    balance = None
    if found[_BALANCE]:
        kernel = kernels.kernel(_BALANCE)
        balance = router_balance.RouterBalance.bind(model, kernel, counter=counter)
    if found[delta_net.DELTA_RULE]:
        convolution, rule = (kernels.kernel(field) for field in _DELTA_NET)
        delta_net.bind_linear_attention(
            model, convolution=convolution, rule=rule, counter=counter, run=run
        )
    table = []
    for field, choice in kernels.choices.items():
        if field == attention.FIELD:
            number, is_bound = num_attention, True
        elif field == head.FIELD:
            number = int(isinstance(runner, head.HeadLoss))
            is_bound = bool(number)
        elif field == _BALANCE:
            number, is_bound = len(found[_BALANCE]), balance is not None
        elif field in _DELTA_NET:
            number, is_bound = len(found[field]), bool(found[field])
        else:
            modules = found.get(field, [])
            number, is_bound = len(modules), bool(modules) and choice.backend != "eager"
            if is_bound:
                _BINDERS[field](modules, kernels.kernel(field), counter)
        table.append(Row(field, choice.backend, number, is_bound, choice.why))
    if found[_MOE] and kernels.choices[_MOE].backend == "eager":
        model.set_experts_implementation("eager")
    return Binding(head=runner, balance=balance, table=table, counter=counter, media=media)


def _what_runs(row: Row) -> str:
    if not row.num_places:
        return "no place"
    return "bound" if row.is_bound else "the model's own code"


def _refuse_placeless(
    model: PreTrainedModel, kernels: KernelSet, found: dict[str, list[nn.Module]]
) -> None:
    # a classifier has few logits, and torch's own loss of them
    always = (attention.FIELD, *([] if is_classifier(model.config) else [head.FIELD]))
    has = [SLOTS[field].name for field in SLOTS if field in always or found.get(field)]
    problems = [
        Problem(
            SLOTS[field].key,
            f"{choice.backend!r} has no place in {type(model).__name__}, whose slots are "
            f"{', '.join(has)}",
            "leave the field out, or set it to eager",
        )
        for field, choice in kernels.choices.items()
        if field not in always
        and choice.is_given
        and choice.backend != "eager"
        and not found.get(field)
    ]
    if problems:
        raise KernelError.of(problems)


def _find(test: Callable[[nn.Module], bool]) -> Callable[[nn.Module], list[nn.Module]]:
    return lambda model: [module for module in model.modules() if test(module)]


def _bind_experts(modules: Sequence[nn.Module], kernel: Kernel, counter: CallCounter) -> None:
    count = counter.adder(_MOE)

    def forward(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        count()
        return kernel(self, hidden, index, weights)

    for module in modules:
        module.forward = MethodType(forward, module)


def _bind_rms_norm(modules: Sequence[nn.Module], kernel: Kernel, counter: CallCounter) -> None:
    count = counter.adder(_RMS_NORM)
    for module in modules:
        eps, offset = places.rms_eps(module), places.measure_rms_offset(module)

        def forward(
            self: nn.Module, hidden: Tensor, _eps: float = eps, _offset: float | None = offset
        ) -> Tensor:
            count()
            return kernel(hidden, self.weight, eps=_eps, offset=_offset)

        module.forward = MethodType(forward, module)


def _bind_norm_gated(modules: Sequence[nn.Module], kernel: Kernel, counter: CallCounter) -> None:
    count = counter.adder(_NORM_GATED)
    for module in modules:
        eps = places.rms_eps(module)

        def forward(self: nn.Module, hidden: Tensor, gate: Tensor, _eps: float = eps) -> Tensor:
            count()
            return kernel(hidden, gate, self.weight, eps=_eps)

        module.forward = MethodType(forward, module)


def _bind_swiglu(modules: Sequence[nn.Module], kernel: Kernel, counter: CallCounter) -> None:
    count = counter.adder(_SWIGLU)

    def forward(self: Any, x: Tensor) -> Tensor:
        count()
        return self.down_proj(kernel(self.gate_proj(x), self.up_proj(x)))

    for module in modules:
        module.forward = MethodType(forward, module)


def _bind_rotary(modules: Sequence[nn.Module], kernel: Kernel, counter: CallCounter) -> None:
    count = counter.adder(_ROTARY)

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        count()
        width = cos.shape[-1]
        if width == q.shape[-1]:
            return kernel(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        turned = kernel(
            q[..., :width], k[..., :width], cos, sin, unsqueeze_dim=unsqueeze_dim
        )  # what lies behind is passed on as it is
        whole = [torch.cat((t, x[..., width:]), -1) for t, x in zip(turned, (q, k), strict=True)]
        return whole[0], whole[1]

    spaces: dict[str, ModuleType] = {}
    for module in modules:
        forward = own_forward(module)
        source = forward.__globals__["__name__"]
        if source not in spaces:
            spaces[source] = copy_space(forward, {places.ROTARY_NAME: rotary}, id(counter))
        rebuild_forward(module, spaces[source])


_FINDERS: Final[Mapping[str, Callable[[nn.Module], list[nn.Module]]]] = MappingProxyType(
    {
        _MOE: _find(places.is_experts),
        _RMS_NORM: _find(lambda module: places.measure_rms_offset(module) is not None),
        _SWIGLU: _find(places.is_swiglu),
        _ROTARY: _find(places.uses_rotary),
        _NORM_GATED: _find(places.is_gated_rms_norm),
        **dict.fromkeys(_DELTA_NET, _find(delta_net.is_delta_net)),
        _BALANCE: lambda model: [model] if places.has_balance_loss(model) else [],
    }
)
_BINDERS: Final[Mapping[str, Callable[[Sequence[nn.Module], Kernel, CallCounter], None]]] = (
    MappingProxyType(
        {
            _MOE: _bind_experts,
            _RMS_NORM: _bind_rms_norm,
            _NORM_GATED: _bind_norm_gated,
            _SWIGLU: _bind_swiglu,
            _ROTARY: _bind_rotary,
        }
    )
)
