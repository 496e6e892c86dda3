"""Attention modules that exchange one projection while they compute the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Final

from torch import Tensor, nn
from torch.compiler import disable
from torch.distributed import ProcessGroup

from omnilit.models.attention import BOUNDARY, packed_attention
from omnilit.models.places import ROTARY_NAME
from omnilit.parallel.ulysses import repeat_heads
from omnilit.parallel.ulysses_async import start_to_heads

# Their attention is three projections, perhaps a norm of each head, and rotary angles: nothing else
MODEL_TYPES: Final = ("gemma3_text", "llama", "qwen2", "qwen3", "qwen3_moe")

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def overlap_exchanges(module: nn.Module, group: ProcessGroup) -> None:
    """Let an attention module hand over queries, keys and values that are exchanged already.

    Args:
        module: Of a model of `MODEL_TYPES`, with kernels bound.
        group: The ranks of Ulysses.
    """
    rotary: Rotary = getattr(module.forward, "__globals__")[ROTARY_NAME]  # noqa: B009
    forward = partial(_forward, group=group, rotary=rotary)
    module.forward = MethodType(disable(forward, reason=BOUNDARY), module)


def _forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    *,
    group: ProcessGroup,
    rotary: Rotary,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As the module's own forward; its layer calls it, and fixes names and outcome."""
    cos, sin = position_embeddings

    def project(name: str) -> Tensor:
        by_head = getattr(module, f"{name}_proj")(hidden_states).unflatten(
            -1, (-1, module.head_dim)
        )
        norm = getattr(module, f"{name}_norm", None)
        return (by_head if norm is None else norm(by_head)).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        # a kernel turns queries and keys together, and may do so in place
        return rotary(x, x[:, :1].clone(), cos, sin)[0]

    query = start_to_heads(rotate(project("q")), group)
    key = start_to_heads(repeat_heads(rotate(project("k")), group.size()), group)
    value = start_to_heads(repeat_heads(project("v"), group.size()), group)
    out, _ = packed_attention(
        module,
        query(),
        key(),
        value(),
        attention_mask,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=getattr(module, "sliding_window", None),
        **kwargs,
    )
    return module.o_proj(out.flatten(2)), None
