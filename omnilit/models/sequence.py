"""Attention of models whose sequences are split over ranks, around any kernel."""

# B batch, N heads, K key heads, T tokens of this rank, H head dim, V head dim of the values

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from omnilit.config import AcceleratorConfig
from omnilit.kernels.attention import AttentionKernel, AttentionRule
from omnilit.kernels.pieces import attend_spans
from omnilit.logging import get_logger
from omnilit.models.attention import bound_attention
from omnilit.models.delta_net import bound_linear_attention
from omnilit.models.delta_sequence import split_linear_attention
from omnilit.models.projections import overlap_exchanges
from omnilit.models.ring import Ring
from omnilit.models.sequence_fit import check_sequence_fit
from omnilit.parallel.gather import gather_row
from omnilit.parallel.mesh import Topology
from omnilit.parallel.sequence import SequenceLayout
from omnilit.parallel.ulysses import heads_to_sequence, repeat_heads, sequence_to_heads

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Attention over the ranks of context parallelism, of gathered keys and values.

    Args:
        kernel: Attends on each rank.
        layout: Which tokens each rank holds.
        group: The ranks.
    """

    kernel: AttentionKernel
    layout: SequenceLayout
    group: ProcessGroup

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKLH: Tensor,
        v_BKLV: Tensor,
        *,
        bounds: Sequence[int],
        rule: AttentionRule,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionKernel`; L is T here, and `bounds` are those of the whole row."""
        k, v = gather_row((k_BKLH, v_BKLV), self.group, self.layout.chunk_order(bounds))
        spans = self.layout.spans(self.group.rank(), bounds)
        return attend_spans(
            self.kernel, q_BNTH, k, v, spans=spans, bounds=bounds, rule=rule, sinks_N=sinks_N
        )


@dataclass(frozen=True, slots=True)
class OfHeads:
    """Attention of all tokens by each rank, for its share of the heads, which has come already.

    Args:
        kernel: Attends on each rank, over a part of the row or the whole.
        group: The ranks, as many as divide the number of heads.
    """

    kernel: AttentionKernel
    group: ProcessGroup

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKLH: Tensor,
        v_BKLV: Tensor,
        *,
        bounds: Sequence[int],
        rule: AttentionRule,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionKernel`; `bounds` are those of the whole row, sinks those of all heads.

        Returns:
            This rank's tokens of all heads.
        """
        own = None if sinks_N is None else sinks_N.chunk(self.group.size())[self.group.rank()]
        out = self.kernel(q_BNTH, k_BKLH, v_BKLV, bounds=bounds, rule=rule, sinks_N=own)
        # contiguous, as every kernel gives it: some models look at it by `view`
        return heads_to_sequence(out.transpose(1, 2), self.group).transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class Ulysses:
    """Attention by `OfHeads`, of tokens that are split over the ranks and traded for heads here.

    Args:
        of_heads: Attends, and trades back.
    """

    of_heads: OfHeads

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKLH: Tensor,
        v_BKLV: Tensor,
        *,
        bounds: Sequence[int],
        rule: AttentionRule,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionKernel`; L is T here, and `bounds` are those of the whole row."""
        group = self.of_heads.group
        keys, values = (repeat_heads(x, group.size()) for x in (k_BKLH, v_BKLV))
        q, k, v = sequence_to_heads((q_BNTH, keys, values), group)
        return self.of_heads(q, k, v, bounds=bounds, rule=rule, sinks_N=sinks_N)


def split_attention(model: PreTrainedModel, topology: Topology, config: AcceleratorConfig) -> None:
    """Let the attention of a model work across the ranks that share its sequences.

    Args:
        model: With kernels bound.
        topology: Its `cp` and `ulysses` meshes are the ranks; nothing happens where they are one.
        config: How keys and values get from rank to rank, and whether exchanges are overlapped.

    Raises:
        ConfigError: The model's attention cannot be done in this way.
    """
    layout = layout_of(topology)
    if layout.num_parts == 1:
        return
    check_sequence_fit(model.config, config)
    for module, attention in bound_attention(model):
        kernel, num_parts = attention.kernel, layout.num_parts
        if layout.cp_size > 1:
            kernel = _over_context(kernel, layout, topology.cp.get_group(), config.cp_method)
        if layout.ulysses_size > 1:
            group = topology.ulysses.get_group()
            kernel = OfHeads(kernel, group)
            if config.enable_async:
                overlap_exchanges(module, group)
                num_parts = layout.cp_size
            else:
                kernel = Ulysses(kernel)
        attention.kernel, attention.num_parts = kernel, num_parts
    linear = bound_linear_attention(model)
    if linear is not None:
        split_linear_attention(linear, layout, topology.sequence.get_group())
    log.info("sequences: %s", _describe(layout, config))


def _describe(layout: SequenceLayout, config: AcceleratorConfig) -> str:
    parts = []
    if layout.cp_size > 1:
        parts.append(f"{layout.cp_size} parts by context parallelism ({config.cp_method})")
    if layout.ulysses_size > 1:
        overlapped = ", exchanges overlapped" if config.enable_async else ""
        parts.append(f"{layout.ulysses_size} parts by Ulysses{overlapped}")
    return ", each in ".join(parts)


def _over_context(
    kernel: AttentionKernel, layout: SequenceLayout, group: ProcessGroup, method: str
) -> AttentionKernel:
    return Ring(layout, group) if method == "ring" else Gathered(kernel, layout, group)


def layout_of(topology: Topology) -> SequenceLayout:
    """Who holds which tokens of a row."""
    return SequenceLayout(topology.sizes.cp_size, topology.sizes.ulysses_size)
