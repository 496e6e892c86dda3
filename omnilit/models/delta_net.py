"""Linear attention inside models of transformers: packed, with the kernels of one model.

transformers' own layers leak: what they do about packing is nothing on a CPU, and with fla it is
the delta rule alone, so the convolution before it still reaches across bounds. So the two
functions that look at other tokens are replaced in the namespace of each instance, with any
backend; the projections, gates and norm around them stay the model's own.
"""

# C channels, W width of the convolution, N value heads, K key heads, T tokens of this rank,
# D key dim, V value dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.compiler import disable
from transformers import PreTrainedModel

from omnilit.errors import KernelError
from omnilit.kernels.slot import Kernel
from omnilit.models.attention import BOUNDARY, PackedRun, Segments
from omnilit.models.calls import CallCounter
from omnilit.models.delta_form import APPLY_RULE, CONVOLVE, is_delta_net
from omnilit.models.namespaces import copy_space, own_forward, rebuild_forward

CONVOLUTION: Final = "causal_conv1d_implementation"
DELTA_RULE: Final = "chunk_gated_delta_rule_implementation"
_KEY: Final = "model.ops_implementation"
_ATTRIBUTE: Final = "omnilit_linear_attention"


@dataclass(slots=True)
class LinearAttention:
    """What the linear attention of one model computes with; it hangs on all its modules.

    Args:
        convolution: The backend, or what spreads it over ranks.
        rule: Likewise.
        counter: Counts the calls until the first step is checked.
        run: Whether bounds have to come.
        num_parts: Ranks that share the tokens between the bounds.
    """

    convolution: Kernel
    rule: Kernel
    counter: CallCounter
    run: PackedRun
    num_parts: int = 1

    def checked_bounds(self, segments: Segments, field: str, x: Tensor, dim: int) -> Sequence[int]:
        """The bounds of a row, once they fit what came with them.

        Args:
            segments: Of the row.
            field: Of the slot that asks.
            x: With one row, and this rank's tokens.
            dim: Where the tokens stand in `x`.

        Raises:
            KernelError: They do not.
        """
        bounds, num_tokens = segments.bounds, x.shape[dim]
        if len(x) != 1 or bounds[-1] != num_tokens * self.num_parts:
            shared = f" on each of {self.num_parts} ranks" if self.num_parts > 1 else ""
            raise KernelError(
                key=f"{_KEY}.{field}",
                problem=f"bounds that end at {bounds[-1]} came with {len(x)} rows of {num_tokens} "
                f"tokens{shared}",
                fix="pack into one row whose length is the last bound, without a cache",
            )
        return bounds

    def refuse_unpacked(self, field: str) -> None:
        """Stop where bounds had to come with a row and did not.

        Raises:
            KernelError: It is a packed one, or this rank has a part of it only.
        """
        if self.run.is_on or self.num_parts > 1:
            raise KernelError(
                key=f"{_KEY}.{field}",
                problem="the code of the model does not say where the sequences of a row end",
                fix="train another model, and generate with one that no ranks share",
            )


def bind_linear_attention(
    model: PreTrainedModel,
    *,
    convolution: Kernel,
    rule: Kernel,
    counter: CallCounter,
    run: PackedRun,
) -> None:
    """Route the linear attention of this instance, and of no other, through two kernels.

    Rows without bounds, as in generation, still go through the model's own functions.

    Args:
        model: Its modules pass `unbindable_reason`.
        convolution: Backend of the slot `causal_conv1d`.
        rule: Backend of the slot `chunk_gated_delta_rule`.
        counter: Counts their calls.
        run: Where packed rows are announced.
    """
    bound = LinearAttention(convolution, rule, counter, run)
    spaces: dict[str, Any] = {}
    for module in filter(is_delta_net, model.modules()):
        forward = own_forward(module)
        source = forward.__globals__["__name__"]
        if source not in spaces:
            functions = {
                CONVOLVE: _packed_convolution(bound, forward.__globals__[CONVOLVE]),
                APPLY_RULE: _packed_rule(bound, forward.__globals__[APPLY_RULE]),
            }
            spaces[source] = copy_space(forward, functions, id(bound))
        rebuild_forward(module, spaces[source])
        setattr(module, _ATTRIBUTE, bound)


def bound_linear_attention(model: nn.Module) -> LinearAttention | None:
    """What `bind_linear_attention` hung on the modules of a model; None where there are none."""
    found = (getattr(module, _ATTRIBUTE, None) for module in model.modules())
    return next((bound for bound in found if bound is not None), None)


def _packed_convolution(bound: LinearAttention, own: Callable[..., Any]) -> Callable[..., Any]:
    """What the model calls to convolve; transformers fixes the signature."""

    @disable(reason=BOUNDARY)
    def convolve(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        segments: Segments | None = kwargs.get("cu_seq_lens_q")
        if segments is None:
            bound.refuse_unpacked(CONVOLUTION)
            return own(hidden_states, weight, bias, activation=activation, **kwargs)
        bounds = bound.checked_bounds(segments, CONVOLUTION, hidden_states, 2)
        bound.counter.add(CONVOLUTION)
        return bound.convolution(hidden_states[0].t(), weight, bias, bounds=bounds).t()[None]

    return convolve


def _packed_rule(bound: LinearAttention, own: Callable[..., Any]) -> Callable[..., Any]:
    """What the model calls to apply the delta rule; transformers fixes the signature."""

    @disable(reason=BOUNDARY)
    def apply_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is None:
            bound.refuse_unpacked(DELTA_RULE)
            return own(query, key, value, g=g, beta=beta, **kwargs)
        if kwargs.get("output_final_state"):
            raise KernelError(
                key=f"{_KEY}.{DELTA_RULE}",
                problem="a packed row came with a cache, which would keep the state of its end",
                fix="pass use_cache=False, or generate one prompt at a time",
            )
        bounds = bound.checked_bounds(cu_seqlens, DELTA_RULE, value, 1)
        bound.counter.add(DELTA_RULE)
        return bound.rule(query[0], key[0], value[0], g[0], beta[0], bounds=bounds)[None], None

    return apply_rule
