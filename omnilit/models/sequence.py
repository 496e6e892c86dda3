"""Attention of models whose sequences are split over ranks, around any kernel."""

# B batch, N heads, K key heads, T tokens of this rank, H head dim, V head dim of the values

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from omnilit.config import AcceleratorConfig
from omnilit.kernels.attention import AttentionKernel, AttentionRule
from omnilit.kernels.pieces import attend_spans
from omnilit.logging import get_logger
from omnilit.models.attention import bound_attention
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
class Ulysses:
    """Attention of all tokens by each rank, for its share of the heads.

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
        """See `AttentionKernel`; L is T here, and `bounds` are those of the whole row."""
        size = self.group.size()
        keys, values = repeat_heads(k_BKLH, size), repeat_heads(v_BKLV, size)
        q, k, v = sequence_to_heads((q_BNTH, keys, values), self.group)
        sinks = None if sinks_N is None else sinks_N.chunk(size)[self.group.rank()]
        out = self.kernel(q, k, v, bounds=bounds, rule=rule, sinks_N=sinks)
        return heads_to_sequence(out.transpose(1, 2), self.group).transpose(1, 2)


def split_attention(model: nn.Module, topology: Topology, config: AcceleratorConfig) -> None:
    """Let the attention of a model work across the ranks that share its sequences.

    Args:
        model: With kernels bound.
        topology: Its `cp` and `ulysses` meshes are the ranks; nothing happens where they are one.
        config: How keys and values get from rank to rank.
    """
    sizes = topology.sizes
    layout = layout_of(topology)
    if layout.num_parts == 1:
        return
    for attention in bound_attention(model):
        kernel = attention.kernel
        if sizes.cp_size > 1:
            kernel = Gathered(kernel, layout, topology.cp.get_group())
        if sizes.ulysses_size > 1:
            kernel = Ulysses(kernel, topology.ulysses.get_group())
        attention.kernel, attention.num_parts = kernel, layout.num_parts
    log.info("sequences: %d ranks share each, as %s", layout.num_parts, config.cp_method)


def layout_of(topology: Topology) -> SequenceLayout:
    """Who holds which tokens of a row."""
    return SequenceLayout(topology.sizes.cp_size, topology.sizes.ulysses_size)
