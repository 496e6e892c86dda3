"""The kernel of attention held against what a model's attention modules ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from omnilit.errors import KernelError
from omnilit.kernels.attention_limits import Demand, shortcomings
from omnilit.kernels.resolve import Choice, KernelSet
from omnilit.kernels.slots import SLOTS
from omnilit.models.attention import FIELD, is_attention
from omnilit.models.towers import language_part


def fit_attention(
    model: PreTrainedModel, kernels: KernelSet, *, has_masks: bool = False
) -> KernelSet:
    """The same kernels, with `sdpa` for attention where `auto` chose what this model cannot use.

    Args:
        model: Not bound yet.
        kernels: As chosen for the machine.
        has_masks: The model says which tokens see some of those behind them.

    Raises:
        KernelError: A backend that was given, or that a preset takes literally, cannot do what the
            model asks.
    """
    choice = kernels.choices[FIELD]
    modules = [module for module in language_part(model).modules() if is_attention(module)]
    reasons = list(
        dict.fromkeys(
            reason
            for module in modules
            for reason in shortcomings(
                choice.backend,
                replace(read_demand(module), has_mask=has_masks),
                kernels.machine,
            )
        )
    )
    if not reasons:
        return kernels
    if not choice.is_auto:
        raise KernelError(
            key=SLOTS[FIELD].key,
            problem=f"{choice.backend!r} cannot run {type(model).__name__}: {'; '.join(reasons)}",
            fix="set it to sdpa",
        )
    other = Choice("sdpa", f"{choice.backend} {reasons[0]}", is_given=False)
    return replace(kernels, choices=MappingProxyType({**kernels.choices, FIELD: other}))


def read_demand(module: nn.Module) -> Demand:
    """What an attention module of transformers asks of a kernel, by the names that it uses.

    Args:
        module: One that calls the attention interface.
    """
    config: Any = getattr(module, "config", None)
    dropout = getattr(module, "attention_dropout", 0.0)
    return Demand(
        head_dim=_first(module, ("qk_head_dim", "head_dim")),
        value_dim=_first(module, ("v_head_dim", "head_dim")),
        has_sinks=getattr(module, "sinks", None) is not None,
        softcap=getattr(config, "attn_logit_softcapping", None),
        dropout=dropout if isinstance(dropout, float) else 0.0,
    )


def _first(module: nn.Module, names: Sequence[str]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
