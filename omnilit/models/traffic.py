"""What one rank sends in a step of training, in closed form.

Bytes that a rank sends, as in the ring algorithms: of `n` ranks, one that gathers or scatters a
tensor of S bytes sends S (n - 1) / n of them, one that sums it over ranks twice as many, and one
that exchanges S bytes of its own with all of them S (n - 1) / n. Sums of a few numbers (token
counts, norms, the norms' own gradients under tensor parallelism) are left out.

Source: Thakur, Rabenseifner, Gropp, Optimization of Collective Communication Operations in MPICH,
Int. J. High Performance Computing Applications 19 (2005), sections 4.1 to 4.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import lcm
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.models.attention import is_attention
from omnilit.models.fit import ModelNumbers
from omnilit.models.tensor_traffic import TokenTraffic, token_traffic
from omnilit.parallel.shards import HeldUnit

SUM_BYTES: Final = 4  # of an element of the sums that a ring hands on: float32


@dataclass(frozen=True, slots=True)
class ModelWidths:
    """What the formulas take of a model, or of the stage of it that a rank holds.

    Args:
        hidden: Width of the residual stream.
        heads: Attention heads of a layer.
        kv_heads: Those of keys and values.
        key_width: Of a head's queries and keys.
        value_width: Of a head's values.
        top_k: Experts that a token is sent to.
        attentions: Layers of attention.
        expert_layers: Layers of experts.
        splits_heads: Tensor parallelism divides attention by heads.
        split: What it sends of a token.
    """

    hidden: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    top_k: int
    attentions: int
    expert_layers: int
    splits_heads: bool
    split: TokenTraffic

    @classmethod
    def of(cls, model: PreTrainedModel, sizes: ParallelSizes) -> ModelWidths:
        """Read a model's configuration, and count what it holds.

        Args:
            model: On the meta device or real.
            sizes: Resolved.
        """
        config = model.config.get_text_config(decoder=True)
        layers = [module for module in model.modules() if is_attention(module)]
        plain = getattr(layers[0], "head_dim", 0) if layers else 0
        return cls(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            key_width=getattr(layers[0], "qk_head_dim", plain) if layers else 0,
            value_width=getattr(layers[0], "v_head_dim", plain) if layers else 0,
            top_k=getattr(config, "num_experts_per_tok", None) or 0,
            attentions=len(layers),
            expert_layers=sum(map(_holds_experts, model.modules())),
            splits_heads=ModelNumbers.of(model.config).is_attention_split,
            split=token_traffic(model, with_experts=sizes.ep_size == 1)
            if sizes.tp_size > 1
            else TokenTraffic(),
        )


def _holds_experts(module: nn.Module) -> bool:
    return any(p.ndim == 3 for p in module.parameters(recurse=False))


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step is made of.

    Args:
        micro_batches: Of each data rank.
        tokens: Of a micro-batch, its filling included; all parts of the sequences together.
        compute_bytes: Of an element of activations and of gathered parameters.
        reduce_bytes: Of an element of gradients that are summed over ranks.
        is_recomputed: The forward of every block runs a second time.
        keeps_gathered: Parameters stay gathered from one micro-batch to the next.
        reductions: How often gradients are summed over ranks.
        is_ring: Keys and values go round from rank to rank, and are not gathered.
        stages_per_rank: Of a pipeline.
    """

    micro_batches: int
    tokens: int
    compute_bytes: int
    reduce_bytes: int
    is_recomputed: bool
    keeps_gathered: bool
    reductions: int = 1
    is_ring: bool = False
    stages_per_rank: int = 1

    @property
    def forwards(self) -> int:
        """How often a block's forward runs in a step."""
        return self.micro_batches * (2 if self.is_recomputed else 1)

    @property
    def passes(self) -> int:
        """How often a block runs in a step, backward too."""
        return self.forwards + self.micro_batches


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends in a step over one axis for one purpose.

    Args:
        axis: Of the mesh.
        what: The operation and its purpose.
        ranks: Of the axis.
        sent: Bytes.
    """

    axis: str
    what: str
    ranks: int
    sent: float


def step_traffic(
    units: Iterable[HeldUnit],
    widths: ModelWidths,
    sizes: ParallelSizes,
    step: StepShape,
    *,
    stage: int,
) -> list[Traffic]:
    """Everything that a rank sends in a step; axes of one rank are left out.

    Args:
        units: What it holds.
        widths: Of its stage of the model.
        sizes: Resolved.
        step: What a step is made of.
        stage: Its place in the pipeline.
    """
    found = [
        *parameter_traffic(units, step),
        *_expert_traffic(widths, sizes, step),
        *_ulysses_traffic(widths, sizes, step),
        *_context_traffic(widths, sizes, step),
        *_tensor_traffic(widths, sizes, step, stage),
        *_stage_traffic(widths, sizes, step, stage),
    ]
    return [traffic for traffic in found if traffic.ranks > 1]


def parameter_traffic(units: Iterable[HeldUnit], step: StepShape) -> Iterator[Traffic]:
    """What FSDP2 gathers and reduces, axis by axis."""
    units, reduced = list(units), step.reductions * step.reduce_bytes
    held = [p for unit in units for p in unit.parameters]
    for axis, ranks in sorted({(p.axis, p.ranks) for p in held}, reverse=True):
        gathers = sum(
            p.part * (ranks - 1) * _num_gathers(unit, step)
            for unit in units
            for p in unit.parameters
            if p.axis == axis
        )
        scatters = sum(p.part * (ranks - 1) for p in held if p.axis == axis and p.is_trained)
        yield Traffic(axis, "gather parameters", ranks, gathers * step.compute_bytes)
        yield Traffic(axis, "reduce-scatter gradients", ranks, scatters * reduced)
    for copies in sorted({p.copies for p in held}):
        summed = sum(p.part for p in held if p.copies == copies and p.is_trained)
        sent = 2 * summed * (copies - 1) / copies * reduced
        yield Traffic("dp_replicate", "all-reduce gradients", copies, sent)


def _num_gathers(unit: HeldUnit, step: StepShape) -> int:
    """How often a unit is gathered in a step.

    One that is freed after forward is gathered for each forward and again for each backward that
    needs it. From there on, or from forward where it is not freed, it may stay gathered to the
    step's end.
    """
    once = 1 if step.keeps_gathered else step.micro_batches
    if not unit.frees_after_forward:
        return once
    return once + step.micro_batches if unit.gathers_for_backward else step.micro_batches


def _local_tokens(sizes: ParallelSizes, step: StepShape) -> int:
    return -(-step.tokens // sizes.sequence_size)


def _expert_traffic(
    widths: ModelWidths, sizes: ParallelSizes, step: StepShape
) -> Iterator[Traffic]:
    """Each token goes to its experts and comes back; backward takes both ways again."""
    ranks = sizes.ep_size
    rows = _local_tokens(sizes, step) / sizes.tp_size * widths.top_k
    one_way = rows * widths.hidden * step.compute_bytes * (ranks - 1) / ranks
    sent = 2 * one_way * step.passes * widths.expert_layers
    yield Traffic("ep", "all-to-all tokens, evenly routed", ranks, sent)


def _attention_heads(widths: ModelWidths, sizes: ParallelSizes) -> tuple[int, int]:
    """Heads that a rank holds before Ulysses, keys and values repeated to be divided by it."""
    tp_size = sizes.tp_size if widths.splits_heads else 1
    heads, kv_heads = widths.heads // tp_size, widths.kv_heads // tp_size
    return heads, lcm(kv_heads, sizes.ulysses_size)


def _ulysses_traffic(
    widths: ModelWidths, sizes: ParallelSizes, step: StepShape
) -> Iterator[Traffic]:
    """Queries, keys and values change from tokens to heads, the output back."""
    ranks = sizes.ulysses_size
    heads, kv_heads = _attention_heads(widths, sizes)
    width = (heads + kv_heads) * (widths.key_width + widths.value_width)
    exchanged = _local_tokens(sizes, step) * width * step.compute_bytes * (ranks - 1) / ranks
    sent = exchanged * step.passes * widths.attentions
    yield Traffic("ulysses", "all-to-all heads", ranks, sent)


def _context_traffic(
    widths: ModelWidths, sizes: ParallelSizes, step: StepShape
) -> Iterator[Traffic]:
    """Keys and values are gathered, their gradients reduced and scattered.

    Or they go round, in backward too, and with them the float32 sums of their gradients, which
    have one step more to go.
    """
    ranks = sizes.cp_size
    _, kv_heads = _attention_heads(widths, sizes)
    tokens = _local_tokens(sizes, step) * sizes.ulysses_size
    own = tokens * kv_heads // sizes.ulysses_size * (widths.key_width + widths.value_width)
    sent = own * (ranks - 1) * step.compute_bytes * step.passes * widths.attentions
    if step.is_ring and ranks > 1:
        sent += own * ranks * SUM_BYTES * step.micro_batches * widths.attentions
    what = "pass keys and values on" if step.is_ring else "gather keys and values"
    yield Traffic("cp", what, ranks, sent)


def _tensor_traffic(
    widths: ModelWidths, sizes: ParallelSizes, step: StepShape, stage: int
) -> Iterator[Traffic]:
    """What blocks send, and a sum a micro-batch behind the embedding and one before the head."""
    ranks = sizes.tp_size
    ends = 2 * widths.hidden * ((stage == 0) + (stage == sizes.pp_size - 1))
    blocks = widths.split.forward * step.forwards + widths.split.backward * step.micro_batches
    elements = _local_tokens(sizes, step) * (blocks + ends * step.micro_batches)
    sent = elements * step.compute_bytes * (ranks - 1) / ranks
    yield Traffic("tp", "gather and sum hidden states", ranks, sent)


def _stage_traffic(
    widths: ModelWidths, sizes: ParallelSizes, step: StepShape, stage: int
) -> Iterator[Traffic]:
    """Hidden states to the next stage, their gradients to the one before."""
    ranks = sizes.pp_size
    ways = 2 * step.stages_per_rank - (stage == 0) - (stage == ranks - 1)
    states = _local_tokens(sizes, step) * widths.hidden * step.compute_bytes
    yield Traffic("pp", "send hidden states", ranks, states * ways * step.micro_batches)
