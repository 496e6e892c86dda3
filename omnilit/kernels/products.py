"""Products of bfloat16 matrices on CPUs that have no fast instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

# Rows and columns that are widened at a time: 64 MiB an operand, whatever the head's vocabulary
BLOCK: Final = 4096


def mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """The matrix product; of bfloat16 in float32, rounded once.

    Exact products added up in float32 and one rounding at the end are what the instructions for
    bfloat16 give too. A library without them takes several times as long as for float32.

    Args:
        a_MK: Any dtype; others than bfloat16 are left to torch, and what it refuses too.
        b_KN: Of the same dtype.
    """
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    if not _are_bfloat16(a_MK, b_KN) or a_MK.shape[1] != b_KN.shape[0]:
        return torch.mm(a_MK, b_KN, out=out_MN)
    for rows, columns in product(_spans(a_MK.shape[0]), _spans(b_KN.shape[1])):
        out_MN[rows, columns] = _block(a_MK[rows], b_KN[:, columns])
    return out_MN


def addmm(bias: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * bias + alpha * a @ b`; of bfloat16 in float32, rounded once. See `mm`.

    Args:
        bias: Broadcasts to [M, N].
        a_MK: Any dtype.
        b_KN: Of the same dtype.
        beta: Factor of the bias; 0 leaves it out, NaN and all.
        alpha: Factor of the product.
    """
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    if not _are_bfloat16(bias, a_MK, b_KN) or a_MK.shape[1] != b_KN.shape[0]:
        return torch.addmm(bias, a_MK, b_KN, beta=beta, alpha=alpha, out=out_MN)
    bias_MN = bias.expand_as(out_MN)
    for rows, columns in product(_spans(a_MK.shape[0]), _spans(b_KN.shape[1])):
        wide = _block(a_MK[rows], b_KN[:, columns]).mul_(alpha)
        if beta != 0:
            wide.add_(bias_MN[rows, columns], alpha=beta)
        out_MN[rows, columns] = wide
    return out_MN


def bmm(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    """A product each of a batch; of bfloat16 in float32, rounded once. See `mm`.

    Args:
        a_BMK: Any dtype.
        b_BKN: Of the same dtype.
    """
    out_BMN = a_BMK.new_empty(a_BMK.shape[0], a_BMK.shape[1], b_BKN.shape[2])
    if not _are_bfloat16(a_BMK, b_BKN):
        return torch.bmm(a_BMK, b_BKN, out=out_BMN)
    largest = max(part[0].numel() for part in (a_BMK, b_BKN, out_BMN)) if len(out_BMN) else 1
    for some in _spans(len(out_BMN), max(BLOCK**2 // max(largest, 1), 1)):
        out_BMN[some] = torch.bmm(
            a_BMK[some].float(),
            b_BKN[some].float(),
            out=out_BMN.new_empty(out_BMN[some].shape, dtype=torch.float32),
        )
    return out_BMN


def _are_bfloat16(*operands: Tensor) -> bool:  # torch refuses a mixture
    return all(operand.dtype == torch.bfloat16 for operand in operands)


def _block(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    wide_MN = a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1], dtype=torch.float32)
    for inner in _spans(a_MK.shape[1]):
        wide_MN.addmm_(a_MK[:, inner].float(), b_KN[inner].float())
    return wide_MN


def _spans(length: int, size: int = BLOCK) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


# What `overrides.replace_operators` takes
FLOAT32_PRODUCTS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"mm": mm, "addmm": addmm, "bmm": bmm}
)
