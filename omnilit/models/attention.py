"""Our packed attention inside models of transformers: one function, a kernel per instance."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.compiler import disable
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omnilit.errors import ConfigError, KernelError
from omnilit.kernels.attention import AttentionKernel, AttentionRule
from omnilit.models.blocks import decoder_blocks
from omnilit.models.calls import CallCounter
from omnilit.models.delta_form import is_delta_net, unbindable_reason
from omnilit.models.layer_mask import CHUNKED, LayerMask
from omnilit.models.model_mask import ModelMask, keep_mask
from omnilit.models.towers import language_part

FIELD: Final = "attn_implementation"
BOUNDARY: Final = "packed attention runs one kernel a segment, between compiled parts"
_KEY: Final = "model.ops_implementation.attn_implementation"
# transformers reads meaning into "sdpa" and "flash" inside a name, so ours holds neither.
_NAME: Final = "omnilit_packed"
_MASKED_NAME: Final = "omnilit_packed_with_masks"
BOUNDS: Final = "cu_seq_lens_q"  # transformers' name, which most of its models hand on
_ATTRIBUTE: Final = "omnilit_attention"
_PACKABLE_LAYERS: Final = frozenset({"full_attention", "sliding_attention", CHUNKED})
_DELTA_LAYER: Final = "linear_attention"  # packed where it is a gated delta net
# Arguments of the interface that change the result and that our kernels do not have.
_UNSUPPORTED: Final = ("attention_mask", "position_bias", "indices", "block_indices", "sinks")


@dataclass(frozen=True, slots=True)
class Segments:
    """The bounds of a packed row on their way through the model's keyword arguments.

    torch.compile looks into a list and compiles anew for every length of it; into this it does
    not look before `packed_attention`, where compiled code ends.

    Args:
        bounds: Ends of the segments, [0, ..., T].
    """

    bounds: Sequence[int]


class PackedRun:
    """Whether a model is running on a packed row at the moment.

    A model's own code hands the bounds on, and code that does not would let sequences attend to
    each other without a word.

    Attributes:
        is_on: True inside of `going_on`.
        segments: Of the block that runs, where its code does not hand them on.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.segments: Segments | None = None

    def listen(self, block: nn.Module) -> None:
        """Note what a block is given whose own code keeps it from its attention.

        The block gets a class of its own: recomputation runs what stands in the class again, and
        with the same arguments, where a hook would run once.
        """
        run, known = self, type(block)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            run.segments = kwargs.get(BOUNDS)
            return known.forward(self, *args, **kwargs)

        block.__class__ = type(known.__name__, (known,), {"forward": forward})

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """The forward pass of a packed row."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


@dataclass(slots=True)
class ModuleAttention:
    """What one attention module computes with; it hangs on the module, so instances differ.

    Args:
        kernel: The backend, or what spreads it over ranks.
        counter: Counts the calls until the first step is checked.
        run: Whether bounds have to come.
        mask: What the model leaves to a mask.
        num_parts: Ranks that share the tokens between the bounds.
    """

    kernel: AttentionKernel
    counter: CallCounter
    run: PackedRun
    mask: LayerMask
    num_parts: int = 1


def bind_attention(
    model: PreTrainedModel,
    kernel: AttentionKernel,
    counter: CallCounter,
    run: PackedRun,
    *,
    has_masks: bool = False,
) -> int:
    """Route every attention module of this instance through packed attention over `kernel`.

    transformers has no mask builder for our name, so it builds no mask at all, and for the other
    one that keeps what the model's code says; the bounds reach
    `packed_attention` through the keyword arguments of the model's forward. Towers beside the
    language model keep transformers' own attention, which sees one image at a time.

    Args:
        model: Only this instance is changed.
        kernel: The backend.
        counter: Counts its calls.
        run: Where packed rows are announced.
        has_masks: Ask the model's own code which tokens see some of those behind them.

    Returns:
        Number of attention modules.

    Raises:
        ConfigError: The model mixes tokens in a way that packing would break.
    """
    language = language_part(model)
    modules = [module for module in language.modules() if is_attention(module)]
    refuse_unpackable(model, modules)
    name = _MASKED_NAME if has_masks else _NAME
    ALL_ATTENTION_FUNCTIONS.register(name, packed_attention)
    if has_masks:
        AttentionMaskInterface.register(name, keep_mask)
    language.set_attn_implementation(name)
    for module in modules:
        mask = LayerMask.of(module)
        assert mask is not None, "checked with what cannot be packed"
        setattr(module, _ATTRIBUTE, ModuleAttention(kernel, counter, run, mask))
    for block in decoder_blocks(language):
        if not _hands_on(block):
            run.listen(block)
    model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
    return len(modules)


def bound_attention(model: nn.Module) -> list[tuple[nn.Module, ModuleAttention]]:
    """The attention modules of a model, with what `bind_attention` hung on them."""
    found = ((module, getattr(module, _ATTRIBUTE, None)) for module in model.modules())
    return [(module, bound) for module, bound in found if bound is not None]


@disable(reason=BOUNDARY)
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls as its attention function; its interface fixes this signature.

    Args:
        module: The attention module, bound by `bind_attention`.
        query: [B, N, T, H].
        key: [B, K, L, H].
        value: [B, K, L, V].
        attention_mask: What the model's code says of some tokens; else None: segments and
            causality take its place.
        scaling: Factor on the scores.
        dropout: Probability that a weight is dropped.
        kwargs: What the model passes on, of which `cu_seq_lens_q` are the `Segments`.

    Returns:
        [B, T, N, V], and no weights.

    Raises:
        KernelError: The module is not bound, the bounds do not fit, or the model asks for
            something that packed attention does not have.
    """
    bound: ModuleAttention | None = getattr(module, _ATTRIBUTE, None)
    mask = attention_mask if isinstance(attention_mask, ModelMask) else None
    given = {"attention_mask": attention_mask if mask is None else None, **kwargs}
    if bound is None or any(given.get(name) is not None for name in _UNSUPPORTED):
        raise _refusal(module, is_bound=bound is not None, given=given)
    segments = kwargs.get(BOUNDS) or bound.run.segments
    if segments is None and bound.run.is_on:
        raise _without_bounds(module)
    bound.counter.add(FIELD)
    is_causal = kwargs.get("is_causal")
    rule = AttentionRule(
        scale=scaling,
        window=kwargs.get("sliding_window") or bound.mask.window,
        softcap=kwargs.get("softcap"),
        dropout=dropout,
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        sees=None if mask is None else mask.sees,
    )
    bounds = bound.mask.part(_checked_bounds(segments, query, key, bound.num_parts))
    if bound.mask.chunk is not None and key.shape[2] != query.shape[2]:
        raise _with_cache(module)
    sinks = kwargs.get("s_aux")
    return bound.kernel(query, key, value, bounds=bounds, rule=rule, sinks_N=sinks), None


def refuse_unpackable(model: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
    """Stop before a model whose sequences would leak into each other without a word.

    Args:
        model: The model.
        modules: Its attention modules.

    Raises:
        ConfigError: With the reason.
    """
    reason = next(_unpackable_reasons(model, modules), None)
    if reason is not None:
        raise ConfigError(
            key="model.config_path",
            problem=f"{type(model).__name__} cannot be trained on packed sequences: {reason}",
            fix="choose a model whose layers are attention, full or sliding, or gated delta nets",
        )


def _unpackable_reasons(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[str]:
    language = language_part(model)
    delta_nets = [module for module in language.modules() if is_delta_net(module)]
    yield from filter(None, map(unbindable_reason, delta_nets))
    layers: list[str] = list(getattr(language.config, "layer_types", None) or ())
    is_covered = 0 < layers.count(_DELTA_LAYER) == len(delta_nets)
    others = set(layers) - _PACKABLE_LAYERS - ({_DELTA_LAYER} if is_covered else set())
    if getattr(model, "_is_stateful", False) and not is_covered:
        yield "it carries a state along the sequence"
    if not modules:
        yield "it has no attention that goes through transformers' attention interface"
    if others:
        yield f"its layers include {', '.join(sorted(others))}"
    if getattr(model.config.get_text_config(), "is_decoder", True) is False:
        yield "its tokens see those behind them (is_decoder: false in its configuration)"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        yield (
            "its forward takes no position_ids, so positions would go on from one sequence to the "
            "next"
        )
    inside = {part for net in delta_nets for part in net.modules()}
    for name, module in language.named_modules():
        if isinstance(module, nn.Conv1d) and module not in inside:
            yield f"{name} convolves along the sequence"
    for module in modules:
        if LayerMask.of(module) is None:
            yield f"{type(module).__name__} leaves its window to a mask and does not say its layer"


def _refuse_padding(module: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Without a mask builder transformers would drop a padding mask, and padding would leak."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise KernelError(
            key=_KEY,
            problem=f"{type(module).__name__} was given a mask with padding, and packed attention "
            "has none",
            fix="pack the sequences, or generate one prompt at a time",
        )


def is_attention(module: nn.Module) -> bool:
    """Whether a module calls transformers' attention interface."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _hands_on(block: nn.Module) -> bool:
    """Whether the code of a block passes keyword arguments on that it does not know."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(block).forward)))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(keyword.arg is None for call in calls for keyword in call.keywords)


def _checked_bounds(
    segments: Segments | None, query: Tensor, key: Tensor, num_parts: int
) -> Sequence[int]:
    batch, _, num_tokens, _ = query.shape
    if segments is None:
        return (0, num_tokens * num_parts)
    bounds = segments.bounds
    if batch != 1 or bounds[-1] != num_tokens * num_parts or key.shape[2] != num_tokens:
        shared = f" on each of {num_parts} ranks" if num_parts > 1 else ""
        raise KernelError(
            key=_KEY,
            problem=f"bounds that end at {bounds[-1]} came with {batch} rows of {num_tokens} "
            f"queries and {key.shape[2]} keys{shared}",
            fix="pack into one row whose length is the last bound, without a cache",
        )
    return bounds


def _without_bounds(module: nn.Module) -> KernelError:
    problem = (
        f"{type(module).__name__} was not told where the sequences of a packed row end: the code "
        "of its model does not hand keyword arguments on"
    )
    return KernelError(key=_KEY, problem=problem, fix="train another model")


def _with_cache(module: nn.Module) -> KernelError:
    problem = (
        f"{type(module).__name__} sees its sequence in chunks, and packed attention cannot tell "
        "where they begin in a cache"
    )
    return KernelError(key=_KEY, problem=problem, fix="generate with use_cache=False")


def _refusal(module: nn.Module, *, is_bound: bool, given: dict[str, Any]) -> KernelError:
    name = type(module).__name__
    if not is_bound:
        problem = f"{name} calls the attention function and was not bound to a kernel"
    else:
        asked = [key for key in _UNSUPPORTED if given.get(key) is not None]
        problem = f"{name} passes {', '.join(asked)}, which packed attention does not have"
    return KernelError(key=_KEY, problem=problem, fix="train another model, or report this one")
