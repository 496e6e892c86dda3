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
) -> Tensor:
    """All logits at once up to MAX_LOGITS of them, in chunks above; see `HeadKernel`.

    Chunks compute the logits twice, so small problems keep theirs for backward instead.
    """
    num_rows, vocab = max(1, hidden_RD.shape[0]), weight_VD.shape[0]  # no row may be supervised
    if num_rows * vocab > MAX_LOGITS:
        num_rows = max(1, CHUNK_LOGITS // vocab)
    return chunked(hidden_RD, weight_VD, targets_R, bias_V, softcap, num_rows)


def chunked(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    num_rows: int,
) -> Tensor:
    """As `HeadKernel`, with the logits of `num_rows` rows in memory at a time, backward too.

    Where that is all rows, their logits are kept for backward, in the dtype of the weights.
    """
    # torch does not type Function.apply
    return _Chunked.apply(hidden_RD, weight_VD, targets_R, bias_V, softcap, num_rows)  # type: ignore[return-value]


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
    ) -> Tensor:
        losses = hidden_RD.new_empty(targets_R.shape, dtype=torch.float32)
        norms = torch.empty_like(losses)
        kept: Tensor | None = None
        for start in range(0, hidden_RD.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            kept = linear(hidden_RD[rows], weight_VD, bias_V)
            _read(kept, targets_R[rows], softcap, losses[rows], norms[rows])
        if hidden_RD.shape[0] > num_rows:
            kept = None
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, bias_V, norms, kept)
        ctx.softcap, ctx.num_rows = softcap, num_rows
        return losses.masked_fill_(targets_R == IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, bias_V, norm_R, kept = ctx.saved_tensors
        grad_R = grads[0].masked_fill(targets_R == IGNORE, 0.0)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)

        def read(rows: slice) -> Tensor:
            logits = linear(hidden_RD[rows], weight_VD, bias_V) if kept is None else kept
            given = norm_R[rows], targets_R[rows], grad_R[rows]
            return _grad_logits(logits, *given, softcap=ctx.softcap, grad_bias=grad_bias)

        if kept is not None:
            grad = read(slice(None))
            grad_hidden, grad_weight = grad @ weight_VD, grad.t() @ hidden_RD
            return grad_hidden, grad_weight, None, _like(grad_bias, bias_V), None, None
        grad_hidden = torch.empty_like(hidden_RD)
        # Sums over chunks in the weight's own bfloat16 would round once a chunk.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, hidden_RD.shape[0], ctx.num_rows):
            rows = slice(start, start + ctx.num_rows)
            grad = read(rows)
            grad_hidden[rows] = grad @ weight_VD
            _add_product(grad_weight, grad, hidden_RD[rows])
        grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, _like(grad_bias, bias_V), None, None


def _read(
    logits: Tensor, targets: Tensor, softcap: float | None, losses: Tensor, norms: Tensor
) -> None:
    """Write the losses and the log-normalisers of a chunk's rows."""
    for rows in _blocks(logits):
        wide = _cap(logits[rows].float(), softcap)
        norms[rows] = wide.logsumexp(-1)
        picked = wide.gather(1, targets[rows].clamp(min=0)[:, None])[:, 0]
        losses[rows] = norms[rows] - picked


def _grad_logits(
    logits: Tensor,
    norms: Tensor,
    targets: Tensor,
    grads: Tensor,
    *,
    softcap: float | None,
    grad_bias: Tensor | None,
) -> Tensor:
    """The gradient of a chunk's logits, like them; that of the bias is added to `grad_bias`."""
    result = torch.empty_like(logits)
    for rows in _blocks(logits):
        wide = _cap(logits[rows].float(), softcap)
        grad = (wide - norms[rows, None]).exp_()
        grad.scatter_add_(1, targets[rows].clamp(min=0)[:, None], -torch.ones_like(grad[:, :1]))
        grad *= grads[rows, None]
        if softcap is not None:
            grad *= 1 - (wide / softcap) ** 2
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        result[rows] = grad
    return result


def _add_product(total_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor) -> None:
    """Add grad^T hidden to a sum in float32, without a tensor of the whole sum's size beside it."""
    for total, grad in zip(total_VD.split(BLOCK), grad_RV.split(BLOCK, dim=1), strict=True):
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), hidden_RD)
        else:
            total.add_(grad.t() @ hidden_RD)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
