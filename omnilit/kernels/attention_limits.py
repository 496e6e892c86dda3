"""What kernels of attention cannot do, asked when a model is bound and not at its first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from omnilit.kernels.machine import Machine


@dataclass(frozen=True, slots=True)
class Demand:
    """What an attention module asks of a kernel.

    Args:
        head_dim: Of queries and keys; None where the module does not say.
        value_dim: Of the values, likewise.
        has_sinks: Whether a learnt score takes a share of the weights.
        softcap: Cap on the scores; None for none.
        dropout: Probability that a weight is dropped in training.
        has_mask: Whether the model says which tokens see some of those behind them.
    """

    head_dim: int | None = None
    value_dim: int | None = None
    has_sinks: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    has_mask: bool = False


def shortcomings(backend: str, demand: Demand, machine: Machine) -> tuple[str, ...]:
    """Every reason why a backend cannot do what is asked; empty where it can.

    Args:
        backend: Name in the slot `attention`; of one that is not known here nothing is said.
        demand: Of a module.
        machine: Its compute capability decides some.
    """
    check = _CHECKS.get(backend)
    if check is None:
        return ()
    return (*([_NO_MASK] if demand.has_mask else []), *check(demand, machine))


_NO_SINKS: Final = "has no attention sinks"
_NO_DROPOUT: Final = "has no dropout"
_NO_MASK: Final = "cannot let tokens of an image see those behind them"
_WIDEST: Final = 256  # head dim of flash-attn 2 and 3


def _flash_attention_2(demand: Demand, _machine: Machine) -> list[str]:
    found = _one_dim(demand)
    return [*found, _NO_SINKS] if demand.has_sinks else found


def _flash_attention_3(demand: Demand, machine: Machine) -> list[str]:
    found = _flash_attention_2(demand, machine)
    return [*found, _NO_DROPOUT] if demand.dropout else found


def _one_dim(demand: Demand) -> list[str]:
    """Values are padded to the head dim of queries and keys, so those may not be wider."""
    head_dim, value_dim = demand.head_dim, demand.value_dim
    found = []
    if head_dim is not None and (head_dim > _WIDEST or head_dim % 8):
        found.append(f"takes head dims up to {_WIDEST} that 8 divides, and this one is {head_dim}")
    if head_dim is not None and value_dim is not None and value_dim > head_dim:
        found.append(f"has one head dim, and values are wider ({value_dim} over {head_dim})")
    return found


def _flash_attention_4(demand: Demand, machine: Machine) -> list[str]:
    """Source: `_validate_head_dims` and the backward passes of flash-attn-4 4.0.0b36."""
    found = [_NO_DROPOUT] if demand.dropout else []
    major = (machine.sm or 0) // 10
    if demand.has_sinks and major not in (9, 10, 11):
        found.append(f"has attention sinks from SM 90 to 119 alone, here is {machine.sm}")
    if demand.head_dim is None:
        return found
    dims = (demand.head_dim, demand.value_dim or demand.head_dim)
    is_small = all(8 <= dim <= 128 for dim in dims)
    is_taken = is_small or dims in ((192, 128), (256, 256))
    if major == 9:
        is_taken = all(8 <= dim <= 256 for dim in dims)
    if any(dim % 8 for dim in dims) or not is_taken:
        found.append(f"does not take head dims {dims[0]} and {dims[1]} on SM {machine.sm}")
    if demand.softcap is not None and dims == (256, 256) and major in (10, 11):
        found.append(f"caps no scores at head dim 256 on SM {machine.sm}")
    return found


def _flex_attention(demand: Demand, _machine: Machine) -> list[str]:
    return [_NO_DROPOUT] if demand.dropout else []


_CHECKS: Final[Mapping[str, Callable[[Demand, Machine], list[str]]]] = MappingProxyType(
    {
        "flash_attention_2": _flash_attention_2,
        "flash_attention_3": _flash_attention_3,
        "flash_attention_4": _flash_attention_4,
        "flex_attention": _flex_attention,
    }
)
