"""Context parallelism's ring: keys and values travel, and no rank ever holds those of the row."""

# B batch, N heads, K key heads, T tokens of this rank, H head dim, V head dim of the values

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from omnilit.kernels.attention import AttentionRule
from omnilit.kernels.blocks import Block, JoinedAttention, JoinedGradients, pair_blocks
from omnilit.parallel.ring import pass_on
from omnilit.parallel.sequence import SequenceLayout

KEYS_TAG, GRADIENTS_TAG = 0, 1


@dataclass(frozen=True, slots=True)
class Ring:
    """Attention over the ranks of context parallelism, by an online softmax of its own.

    Args:
        layout: Which tokens each rank holds.
        group: The ranks.
    """

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
        assert not rule.dropout, "a model with dropout in its attention gets no ring"
        turn = _Turn(self.layout, self.group, tuple(bounds), rule)
        out = _RingAttention.apply(q_BNTH, k_BKLH, v_BKLV, sinks_N, turn)
        return out.transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One trip of all keys around the ring."""

    layout: SequenceLayout
    group: ProcessGroup
    bounds: tuple[int, ...]
    rule: AttentionRule

    def rounds(self) -> Iterator[list[Block]]:
        """What there is to attend to in each round: first to this rank's own keys."""
        rank, size = self.group.rank(), self.group.size()
        spans = self.layout.all_spans(self.bounds)
        for step in range(size):
            key_spans = spans[(rank - step) % size]
            yield list(pair_blocks(spans[rank], key_spans, self.bounds, self.rule))


class _RingAttention(Function):
    """Keys and values go round once in forward and once in backward, there with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, turn: _Turn
    ) -> Tensor:
        joined = JoinedAttention(q, v.shape[-1], turn.rule, sinks)
        travelling = _pack(k, v)
        for step, blocks in enumerate(turn.rounds()):
            is_last = step == turn.group.size() - 1
            passing = None if is_last else pass_on(travelling, turn.group, tag=KEYS_TAG)
            for block in blocks:
                joined.add(*_unpack(travelling, k, v), block)
            if passing is not None:
                travelling = passing.wait()
        out, norms = joined.finish()
        ctx.save_for_backward(q, k, v, sinks, out, norms)
        ctx.turn = turn
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, norms = ctx.saved_tensors
        turn: _Turn = ctx.turn
        gradients = JoinedGradients(q, out, norms, grads[0], turn.rule)
        travelling = _pack(k, v)
        sums = torch.zeros_like(travelling, dtype=torch.float32)
        for step, blocks in enumerate(turn.rounds()):
            is_last = step == turn.group.size() - 1
            passing = None if is_last else pass_on(travelling, turn.group, tag=KEYS_TAG)
            for block in blocks:
                gradients.add(_unpack(travelling, k, v), _unpack(sums, k, v), block)
            # after the last round the sums have one step to go: home
            sums = pass_on(sums, turn.group, tag=GRADIENTS_TAG).wait()
            if passing is not None:
                travelling = passing.wait()
        grad_q, grad_sinks = gradients.finish(sinks)
        grad_k, grad_v = (x.to(k.dtype) for x in _unpack(sums, k, v))
        return grad_q, grad_k, grad_v, grad_sinks, None


def _pack(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat((k.flatten(), v.flatten()))


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, or their gradients, as views shaped like `k` and `v`."""
    keys, values = packed.split((k.numel(), v.numel()))
    return keys.view(k.shape), values.view(v.shape)
