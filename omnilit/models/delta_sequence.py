"""Linear attention of models whose sequences are split over ranks, around any kernels.

Of the row before its tokens a convolution needs no more than its width, so ranks hand each other
the last tokens of what they hold. The delta rule has to see a row from its start, and its heads
know nothing of each other: so all ranks that share a row, those of context parallelism too, trade
tokens for heads.
"""

# T tokens of this rank, C channels, W width of the convolution, N value heads, K key heads,
# D key dim, V value dim

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from omnilit.kernels.slot import Kernel
from omnilit.models.delta_net import LinearAttention
from omnilit.parallel.gather import gather_row
from omnilit.parallel.sequence import SequenceLayout
from omnilit.parallel.shares import TOKENS
from omnilit.parallel.ulysses import heads_to_sequence, repeat_heads, sequence_to_heads


@dataclass(frozen=True, slots=True)
class SplitConvolution:
    """The convolution of a row of which each rank has some tokens.

    Args:
        kernel: Convolves on each rank.
        layout: Which tokens each rank holds.
        group: All ranks that share the row.
    """

    kernel: Kernel
    layout: SequenceLayout
    group: ProcessGroup

    def __call__(
        self, x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, bounds: Sequence[int]
    ) -> Tensor:
        """See `kernels.linear_attention.causal_conv1d`; `bounds` are those of the whole row."""
        order, gap = self.layout.unit_order(bounds), weight_CW.shape[-1] - 1
        own = order[self.group.rank() * len(order) // self.group.size() :]
        own = own[: len(order) // self.group.size()]
        units = x_TC.unflatten(0, (len(own), -1))
        size = units.shape[1]
        kept = min(gap, size)
        ends = units[:, size - kept :].flatten(0, 1)
        (row,) = gather_row((ends[None, None],), self.group, order)
        row = pad(row[0, 0], (0, 0, gap, 0))  # of every unit in turn its last tokens
        parts, local = [], [0]
        for number, unit in zip(own, units, strict=True):
            parts += [row[number * kept : number * kept + gap], unit]
            first = number * size - gap
            inside = bounds[bisect_right(bounds, first) : bisect_left(bounds, first + gap + size)]
            local += [*(local[-1] + bound - first for bound in inside), local[-1] + gap + size]
        out = self.kernel(torch.cat(parts), weight_CW, bias_C, bounds=local)
        return out.unflatten(0, (len(own), -1))[:, gap:].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class SplitDeltaRule:
    """The delta rule over whole rows by each rank, for its share of the heads.

    Args:
        kernel: Applies the rule on each rank.
        layout: Which tokens each rank holds.
        group: All ranks that share the row, as many as divide the number of value heads.
    """

    kernel: Kernel
    layout: SequenceLayout
    group: ProcessGroup

    def __call__(
        self,
        q_TKD: Tensor,
        k_TKD: Tensor,
        v_TNV: Tensor,
        log_decay_TN: Tensor,
        beta_TN: Tensor,
        *,
        bounds: Sequence[int],
    ) -> Tensor:
        """As `kernels.linear_attention.chunk_gated_delta_rule`, of this rank's tokens.

        The `bounds` are those of the whole row.
        """
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TKD, k_TKD, v_TNV))
        q, k = (repeat_heads(x, self.group.size()) for x in (q, k))
        gates = torch.stack((log_decay_TN.float(), beta_TN.float()), -1).transpose(0, 1)[None]
        came = (*sequence_to_heads((q, k, v), self.group), *sequence_to_heads((gates,), self.group))
        order = self.layout.unit_order(bounds)
        places = sorted(range(len(order)), key=order.__getitem__)
        q, k, v, gates = (_reorder(x, places)[0].transpose(0, 1) for x in came)
        log_decay, beta = gates.unbind(-1)
        out = self.kernel(q, k, v, log_decay, beta.to(beta_TN.dtype), bounds=bounds)
        out = _reorder(out.transpose(0, 1)[None], order)
        return heads_to_sequence(out, self.group)[0].transpose(0, 1)


def split_linear_attention(
    linear: LinearAttention, layout: SequenceLayout, group: ProcessGroup
) -> None:
    """Let the linear attention of a model work across the ranks that share its sequences.

    Args:
        linear: What the model computes with.
        layout: Which tokens each rank holds.
        group: All ranks that share a row.
    """
    linear.convolution = SplitConvolution(linear.convolution, layout, group)
    linear.rule = SplitDeltaRule(linear.rule, layout, group)
    linear.num_parts = layout.num_parts


def _reorder(x_BNTH: Tensor, order: Sequence[int]) -> Tensor:
    """The equal parts of a row in another order."""
    if list(order) == list(range(len(order))):
        return x_BNTH
    parts = x_BNTH.chunk(len(order), TOKENS)
    return torch.cat([parts[number] for number in order], TOKENS)
