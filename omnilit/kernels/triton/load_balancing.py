"""The router's balance loss: the backend `triton` of the slot `load_balancing_loss`.

Nothing of the size of the probabilities is kept: backward makes them of the logits again.
"""

# T tokens, E experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnilit.kernels.triton.launch import fit_block

ROWS: Final = 8  # tokens that a program takes at a time
STEPS: Final = 8  # times that it does
LAUNCH: Final = {"num_warps": 4}


@triton.jit
def _probabilities(logits_ptr, is_real_ptr, row, T, E, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Softmax of some rows, 0 past the last expert; and which rows count."""
    column = tl.arange(0, BLOCK)
    is_row = row < T
    mask = is_row[:, None] & (column < E)[None, :]
    place = row.to(tl.int64)[:, None] * E + column[None, :]
    logits = tl.load(logits_ptr + place, mask=mask, other=0.0).to(tl.float32)
    logits = tl.where((column < E)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    is_real = is_row
    if HAS_MASK:
        is_real = is_row & (tl.load(is_real_ptr + row, mask=is_row, other=0) != 0)
    return powers / tl.sum(powers, 1)[:, None], is_real


@triton.jit
def sums_kernel(
    logits_ptr,
    is_real_ptr,
    part_ptr,
    T,
    E,
    TOP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Routed slots and probabilities of each expert over some rows."""
    column = tl.arange(0, BLOCK)
    slots = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        shares, is_real = _probabilities(logits_ptr, is_real_ptr, row, T, E, HAS_MASK, BLOCK)
        real = tl.where(is_real, 1.0, 0.0)[:, None]
        total += tl.sum(shares * real, 0)
        left = tl.where((column < E)[None, :], shares, -1.0)
        for _ in range(TOP_K):
            is_best = column[None, :] == tl.argmax(left, 1)[:, None]
            slots += tl.sum(tl.where(is_best, real, 0.0), 0)
            left = tl.where(is_best, -1.0, left)  # below any probability
    part = part_ptr + tl.program_id(0) * 2 * E + column
    tl.store(part, slots, mask=column < E)
    tl.store(part + E, total, mask=column < E)


@triton.jit
def grad_kernel(
    logits_ptr,
    is_real_ptr,
    grad_ptr,
    out_ptr,
    T,
    E,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The logits' gradient from that of the sums of probabilities."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    shares, is_real = _probabilities(logits_ptr, is_real_ptr, row, T, E, HAS_MASK, BLOCK)
    grad = tl.load(grad_ptr + column, mask=column < E, other=0.0)[None, :]
    out = shares * (grad - tl.sum(shares * grad, 1)[:, None])
    out = tl.where(is_real[:, None], out, 0.0).to(out_ptr.dtype.element_ty)
    mask = (row < T)[:, None] & (column < E)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * E + column[None, :], out, mask=mask)


def sums(
    router_logits: Sequence[Tensor], *, num_experts: int, top_k: int, is_real: Tensor | None = None
) -> Tensor:
    """As `kernels.load_balancing.eager`, a layer at a time."""
    if is_real is not None:
        is_real = is_real.contiguous()
    layers = [_Sums.apply(logits, top_k, is_real) for logits in router_logits]
    of_experts = torch.stack(layers).sum(0)  # type: ignore[arg-type]
    if is_real is None:
        num_rows = of_experts.new_tensor(router_logits[0].shape[0])
    else:
        num_rows = is_real.sum(dtype=torch.float32)
    assert of_experts.numel() == 2 * num_experts
    return torch.cat([of_experts, (len(router_logits) * num_rows).view(1)])


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, is_real: Tensor | None) -> Tensor:
        logits = logits.contiguous()
        num_rows, num_experts = logits.shape
        ctx.save_for_backward(logits, is_real)
        num_programs = triton.cdiv(num_rows, ROWS * STEPS)
        parts = logits.new_empty(num_programs, 2 * num_experts, dtype=torch.float32)
        if num_rows:
            sums_kernel[(num_programs,)](
                logits,
                logits if is_real is None else is_real,
                parts,
                num_rows,
                num_experts,
                TOP_K=top_k,
                HAS_MASK=is_real is not None,
                ROWS=ROWS,
                STEPS=STEPS,
                BLOCK=fit_block(num_experts),
                **LAUNCH,
            )
        return parts.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, is_real = ctx.saved_tensors
        num_rows, num_experts = logits.shape
        out = torch.empty_like(logits)
        if num_rows:
            grad_kernel[(triton.cdiv(num_rows, ROWS),)](
                logits,
                logits if is_real is None else is_real,
                grads[0][num_experts:].contiguous(),
                out,
                num_rows,
                num_experts,
                HAS_MASK=is_real is not None,
                ROWS=ROWS,
                BLOCK=fit_block(num_experts),
                **LAUNCH,
            )
        return out, None, None
