"""The head and its cross-entropy in one: logits are never kept for more tokens than needed."""

# R supervised rows, D hidden size, V vocabulary

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from omnilit.types import IGNORE

MAX_LOGITS: Final = 2**26  # above this many (256 MiB in float32) logits exist a chunk at a time
CHUNK_LOGITS: Final = 2**24  # of a chunk; several tensors of its size exist at once
CACHED_LOGITS: Final = 2**19  # that a CPU works on at a time: 2 MiB in float32 stay in its cache
BLOCK: Final = 2**14  # tokens of the vocabulary whose weights' gradient is added up at a time


class HeadKernel(Protocol):
    """The signature of the slot `cross_entropy_loss`."""

    def __call__(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        targets_R: Tensor,
        *,
        bias_V: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Negative log-likelihood of each target.

        Args:
            hidden_RD: What the head is applied to, [R, D]; R may be 0.
            weight_VD: The head's weight [V, D].
            targets_R: Token ids [R]; IGNORE gives 0 and no gradient.
            bias_V: The head's bias [V], if any.
            softcap: Logits pass through `softcap * tanh(logit / softcap)` where given.

        Returns:
            One float32 loss a row, [R].
        """
        ...


class VocabularyParts(Protocol):
    """Ranks that each hold some rows of a head's weight, as the kernel sees them."""

    @property
    def first(self) -> int:
        """The token id of this rank's first row."""
        ...

    def join(self, norms_R: Tensor, picked_R: Tensor) -> tuple[Tensor, Tensor]:
        """Log-normalisers over the whole vocabulary, and the logits of all targets.

        Args:
            norms_R: Log-normalisers over this rank's part.
            picked_R: Logits of the targets that lie in it, 0 for the others.
        """
        ...

    def sum(self, grad_RD: Tensor) -> Tensor:
        """The hidden states' gradient, to which each rank adds that of its part."""
        ...


def eager(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The reference: all logits, in float32; see `HeadKernel`."""
    logits_RV = _cap(linear(hidden_RD, weight_VD, bias_V).float(), softcap)
    return cross_entropy(logits_RV, targets_R, reduction="none", ignore_index=IGNORE)


def chunk_loss(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    parts: VocabularyParts | None = None,
) -> Tensor:
    """All logits at once up to MAX_LOGITS of them, in chunks above; see `HeadKernel`.

    Chunks compute the logits twice, so small problems keep theirs for backward instead. With
    `parts`, weight and bias are this rank's rows, and logits of others are never seen here.
    """
    num_rows, vocab = max(1, hidden_RD.shape[0]), weight_VD.shape[0]  # no row may be supervised
    if num_rows * vocab > MAX_LOGITS:
        num_rows = max(1, CHUNK_LOGITS // vocab)
    return chunked(hidden_RD, weight_VD, targets_R, bias_V, softcap, num_rows, parts)


def chunked(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    num_rows: int,
    parts: VocabularyParts | None = None,
) -> Tensor:
    """As `chunk_loss`, with the logits of `num_rows` rows in memory at a time, backward too.

    Where that is all rows, their logits are kept for backward, in the dtype of the weights.
    """
    # torch does not type Function.apply
    arguments = hidden_RD, weight_VD, targets_R, bias_V, softcap, num_rows, parts
    return _Chunked.apply(*arguments)  # type: ignore[return-value]


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _blocks(logits: Tensor) -> list[slice]:
    """Rows whose float32 values are worked on together: on a CPU as many as its cache holds."""
    num_rows, vocab = logits.shape
    size = max(1, CACHED_LOGITS // vocab) if logits.device.type == "cpu" else max(1, num_rows)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


class _Chunked(torch.autograd.Function):
    """Keeps one log-normaliser a row and, of several chunks, computes the logits again in backward.

    So it is exact for any weighting of the rows, and costs nothing without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        targets_R: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        num_rows: int,
        parts: VocabularyParts | None,
    ) -> Tensor:
        picked = hidden_RD.new_empty(targets_R.shape, dtype=torch.float32)
        norms = torch.empty_like(picked)
        is_ignored = targets_R == IGNORE
        targets_R = targets_R - (parts.first if parts is not None else 0)
        kept: Tensor | None = None
        for start in range(0, hidden_RD.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            kept = linear(hidden_RD[rows], weight_VD, bias_V)
            _read(kept, targets_R[rows], softcap, picked[rows], norms[rows])
        if hidden_RD.shape[0] > num_rows:
            kept = None
        if parts is not None:
            norms, picked = parts.join(norms, picked)
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, is_ignored, bias_V, norms, kept)
        ctx.softcap, ctx.num_rows, ctx.parts, ctx.is_used_up = softcap, num_rows, parts, False
        return (norms - picked).masked_fill_(is_ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, is_ignored, bias_V, norm_R, kept = ctx.saved_tensors
        grad_R = grads[0].masked_fill(is_ignored, 0.0)
        is_trained, has_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if has_bias else None

        def read(rows: slice) -> Tensor:
            if kept is None or ctx.is_used_up:
                logits = linear(hidden_RD[rows], weight_VD, bias_V)
            else:
                logits = kept.data
            given = norm_R[rows], targets_R[rows], grad_R[rows]
            _grad_logits(logits, *given, softcap=ctx.softcap, grad_bias=grad_bias)
            return logits

        if kept is not None:
            grad = read(slice(None))
            ctx.is_used_up = True  # a second backward computes them again
            grad_hidden = grad @ weight_VD
            grad_weight = grad.t() @ hidden_RD if is_trained else None
            return _results(ctx, grad_hidden, grad_weight, _like(grad_bias, bias_V))
        grad_hidden = torch.empty_like(hidden_RD)
        # Sums over chunks in the weight's own bfloat16 would round once a chunk.
        sums = torch.zeros_like(weight_VD, dtype=torch.float32) if is_trained else None
        for start in range(0, hidden_RD.shape[0], ctx.num_rows):
            rows = slice(start, start + ctx.num_rows)
            grad = read(rows)
            grad_hidden[rows] = grad @ weight_VD
            if sums is not None:
                _add_product(sums, grad, hidden_RD[rows])
        grad_weight = None if sums is None else sums.to(weight_VD.dtype)
        return _results(ctx, grad_hidden, grad_weight, _like(grad_bias, bias_V))


def _results(
    ctx: Any, grad_hidden: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """One gradient an argument of forward; that of hidden states is a sum over the parts."""
    if ctx.parts is not None:
        grad_hidden = ctx.parts.sum(grad_hidden)
    return grad_hidden, grad_weight, None, grad_bias, None, None, None


def _locate(targets: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For each row the target's place among the logits at hand, and whether it is there."""
    is_here = (targets >= 0) & (targets < num_tokens)
    return targets.clamp(0, num_tokens - 1)[:, None], is_here[:, None]


def _read(
    logits: Tensor, targets: Tensor, softcap: float | None, picked: Tensor, norms: Tensor
) -> None:
    """Write the targets' logits and the log-normalisers of a chunk's rows."""
    for rows in _blocks(logits):
        wide = _cap(logits[rows].float(), softcap)
        norms[rows] = wide.logsumexp(-1)
        place, is_here = _locate(targets[rows], wide.shape[1])
        picked[rows] = (wide.gather(1, place) * is_here)[:, 0]


def _grad_logits(
    logits: Tensor,
    norms: Tensor,
    targets: Tensor,
    grads: Tensor,
    *,
    softcap: float | None,
    grad_bias: Tensor | None,
) -> None:
    """Put a chunk's logits' gradient in their place; that of the bias is added to `grad_bias`."""
    is_final = logits.dtype == torch.float32 and softcap is None
    for rows in _blocks(logits):
        wide = _cap(logits[rows].float(), softcap)
        shifted = wide.sub_ if is_final else wide.sub  # a cap wants the logits once more
        grad = shifted(norms[rows, None]).exp_()
        place, is_here = _locate(targets[rows], wide.shape[1])
        grad.scatter_add_(1, place, -is_here.to(grad.dtype))
        grad *= grads[rows, None]
        if softcap is not None:
            grad *= 1 - (wide / softcap) ** 2
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        if not is_final:
            logits[rows] = grad


def _add_product(total_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor) -> None:
    """Add grad^T hidden to a sum in float32, without a tensor of the whole sum's size beside it."""
    for total, grad in zip(total_VD.split(BLOCK), grad_RV.split(BLOCK, dim=1), strict=True):
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), hidden_RD)
        else:
            total.add_(grad.t() @ hidden_RD)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
