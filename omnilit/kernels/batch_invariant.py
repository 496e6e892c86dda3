"""Operators whose rows have the same bits whatever other rows they are computed with.

A library chooses how to add up the products of a row by how many rows there are, and so a sample's
logits depend on what it is packed with. Here that choice is made by the shape of one row alone.
"""

# M and R rows, K summed, N columns

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch
from torch import Tensor

# Rows that a CPU multiplies at a time, tried in this order; of one row there is but one place
BLOCKS: Final = (64, 16, 1)
TRIED: Final = 1024  # values that blocks of a shape are tried with, each at every place
ALIGNMENT: Final = 64  # bytes, of a line of the cache
WIDENED: Final = 4096  # columns of a narrow matrix that a CPU widens at a time
_NARROW: Final = (torch.bfloat16, torch.float16)  # are computed in float32 and rounded once
_ROW_TYPES: Final = (torch.float32, *_NARROW)
_ON_GPU: Final = "omnilit.kernels.triton.row_sums"  # of `RowKernels`; imported where it runs
# Backends whose rows are computed alike in any batch, by field of `ops_implementation`. Attention
# works a packed sample at a time; what is not listed was not looked at, or is known not to be.
BACKENDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
        "moe_implementation": ("eager", "fused_triton"),
        "cross_entropy_loss_implementation": ("eager", "chunk_loss", "npu"),
        "rms_norm_implementation": ("eager", "torch", "triton"),
        # these work on single values
        "swiglu_mlp_implementation": ("eager", "liger_kernel"),
        "rotary_pos_emb_implementation": ("eager", "liger_kernel", "triton"),
        "load_balancing_loss_implementation": ("eager", "triton"),
        "rms_norm_gated_implementation": ("eager",),
        "causal_conv1d_implementation": (),
        "chunk_gated_delta_rule_implementation": (),  # its chunks are those of a whole row
    }
)


class RowKernels(Protocol):
    """What a device has to offer; rows lie one after the other."""

    def multiply(self, a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
        """The product, added up in float32 where the operands are narrower."""
        ...

    def log_norms(self, x_RN: Tensor) -> Tensor:
        """Of the exponentials of each row the logarithm of the sum, [R] in float32 or wider."""
        ...

    def mean(self, x_RN: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean of each row, [R]."""
        ...


def invariant_operators(device_type: str) -> dict[str, Callable[..., Any]]:
    """What `overrides.replace_operators` takes for a device.

    Args:
        device_type: `cpu` or `cuda`.
    """
    if device_type == "cpu":
        single = {"silu": silu, "gelu": gelu, "sigmoid": sigmoid, "softplus": softplus}
        return {**_Operators(_CPURows()).by_name(), **single}
    kernels: Any = import_module(_ON_GPU)
    return _Operators(kernels).by_name()


class _Operators:
    """Torch's operators over the kernels of a device.

    Matrices of other types than models compute in are left to torch, and what it refuses too.
    """

    def __init__(self, kernels: RowKernels) -> None:
        self._kernels = kernels

    def by_name(self) -> dict[str, Callable[..., Any]]:
        return {
            "mm": self.mm,
            "addmm": self.addmm,
            "_log_softmax": self.log_softmax,
            "logsumexp": self.logsumexp,
            "mean.dim": self.mean,
        }

    def mm(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        if not _fit(a_MK, b_KN):
            return torch.mm(a_MK, b_KN, out=a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]))
        return self._kernels.multiply(a_MK, b_KN, a_MK.dtype)

    def addmm(
        self, bias: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        if not _fit(a_MK, b_KN) or bias.dtype != a_MK.dtype:
            out = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
            return torch.addmm(bias, a_MK, b_KN, beta=beta, alpha=alpha, out=out)
        wide = self._kernels.multiply(a_MK, b_KN, torch.float32).mul_(alpha)
        if beta != 0:
            wide.add_(bias.float(), alpha=beta)
        return wide.to(a_MK.dtype)

    def logsumexp(self, x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
        if x.dtype not in _ROW_TYPES or x.numel() == 0:
            return torch.logsumexp(x, list(dim), keepdim, out=x.new_empty(0))
        norms = self._kernels.log_norms(_as_rows(x, dim)).to(x.dtype)
        return _shape_like(norms, x, dim, keepdim=keepdim)

    def log_softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        if x.dtype not in _ROW_TYPES or x.numel() == 0:
            return x - torch.logsumexp(x, [dim], keepdim=True, out=x.new_empty(0))
        norms = self._kernels.log_norms(_as_rows(x, [dim]))
        wide = x.float() - _shape_like(norms, x, [dim], keepdim=True)
        return wide.to(torch.float32 if half_to_float else x.dtype)

    def mean(
        self,
        x: Tensor,
        dim: Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        dims = list(dim or range(x.ndim))
        if x.dtype not in _ROW_TYPES or x.numel() == 0:
            out = x.new_empty(0, dtype=dtype or x.dtype)
            return torch.mean(x, dims, keepdim, dtype=dtype, out=out)
        means = self._kernels.mean(_as_rows(x, dims), dtype or x.dtype)
        return _shape_like(means, x, dims, keepdim=keepdim)


def _fit(a_MK: Tensor, b_KN: Tensor) -> bool:
    is_type = a_MK.dtype in _ROW_TYPES and a_MK.dtype == b_KN.dtype
    return is_type and a_MK.shape[1] == b_KN.shape[0]


def _as_rows(x: Tensor, dims: Sequence[int]) -> Tensor:
    """A matrix whose rows hold what lies along `dims`."""
    if x.ndim == 0:
        return x.view(1, 1)
    turned = x.movedim(list(dims), list(range(-len(dims), 0)))
    return turned.reshape(-1, turned.shape[-len(dims) :].numel())


def _shape_like(out_R: Tensor, x: Tensor, dims: Sequence[int], *, keepdim: bool) -> Tensor:
    """One value a row in the shape that a reduction of `x` along `dims` has."""
    gone = {d % max(x.ndim, 1) for d in dims}
    if keepdim:
        return out_R.view([1 if d in gone else size for d, size in enumerate(x.shape)])
    return out_R.view([size for d, size in enumerate(x.shape) if d not in gone])


class _CPURows:
    """Products of blocks with one number of rows, which the library computes in one way.

    In some shapes, of few columns, it treats rows by their place in the block. So each shape is
    tried once, with blocks of equal rows, and gets the largest block whose rows come out equal.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[Any, ...], int] = {}

    def multiply(self, a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
        out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=dtype)
        if out_MN.numel() == 0:
            return out_MN
        num_columns = WIDENED if b_KN.dtype in _NARROW else b_KN.shape[1]
        for start in range(0, b_KN.shape[1], num_columns):
            columns = slice(start, start + num_columns)
            self._multiply(a_MK, b_KN[:, columns].to(torch.float32), out_MN[:, columns])
        return out_MN

    def _multiply(self, a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
        size = self._find_block(b_KN)
        block_RK = b_KN.new_zeros(size, a_MK.shape[1])  # of its own: its place in memory counts
        result_RN = b_KN.new_empty(size, b_KN.shape[1])
        for start in range(0, a_MK.shape[0], size):
            rows_RK = a_MK[start : start + size]
            block_RK[: rows_RK.shape[0]] = rows_RK
            torch.mm(block_RK, b_KN, out=result_RN)
            out_MN[start : start + size] = result_RN[: rows_RK.shape[0]]

    def _find_block(self, b_KN: Tensor) -> int:
        key = (*b_KN.shape, *b_KN.stride(), b_KN.data_ptr() % ALIGNMENT)
        if key not in self._blocks:
            self._blocks[key] = next(size for size in BLOCKS if _rows_agree(b_KN, size))
        return self._blocks[key]

    def log_norms(self, x_RN: Tensor) -> Tensor:
        top_R = x_RN.amax(-1).float()
        top_R = top_R.masked_fill(top_R == -torch.inf, 0.0)
        return _add_halves((x_RN.float() - top_R[:, None]).exp_()).log_().add_(top_R)

    def mean(self, x_RN: Tensor, dtype: torch.dtype) -> Tensor:
        return _add_halves(x_RN.float()).div_(x_RN.shape[1]).to(dtype)


def _rows_agree(b_KN: Tensor, size: int) -> bool:
    """Whether a row comes out alike at each place of a block, tried with several rows.

    The matrix is another one that lies as this one does: in one of zeros all rows come out alike.
    """
    if size == 1:
        return True
    num_inner, num_columns = b_KN.shape
    num_tries = 1 + TRIED // num_columns
    tried_KN, result_RN = _lying_as(b_KN), b_KN.new_empty(size, num_columns)
    for row_K in _uneven(num_tries * num_inner).view(num_tries, num_inner):
        torch.mm(row_K.expand(size, -1).contiguous(), tried_KN, out=result_RN)
        if not torch.equal(result_RN, result_RN[:1].expand_as(result_RN)):
            return False
    return True


def _lying_as(b_KN: Tensor) -> Tensor:
    """Values of no pattern, with the strides of `b_KN` and as far from the start of a line."""
    reach = sum((n - 1) * step for n, step in zip(b_KN.shape, b_KN.stride(), strict=True)) + 1
    room = _uneven(reach + ALIGNMENT // b_KN.element_size())
    offset = (b_KN.data_ptr() - room.data_ptr()) % ALIGNMENT // b_KN.element_size()
    return room.as_strided(b_KN.shape, b_KN.stride(), offset)


def _uneven(count: int) -> Tensor:
    return torch.arange(1.0, count + 1).sqrt_().frac_().sub_(0.5)


def _add_halves(x_RN: Tensor) -> Tensor:
    """Sums of rows, by adding one half to the other: additions of single values, in one order."""
    while (size := x_RN.shape[1]) > 1:
        half = (size + 1) // 2
        added = x_RN[:, :half].clone()
        added[:, : size - half] += x_RN[:, half:]
        x_RN = added
    return x_RN[:, 0].clone()


def silu(x: Tensor) -> Tensor:
    """As torch's, whose vectors and what is left over beside them differ in their exponentials."""
    wide = x.float() if x.dtype in _NARROW else x
    return (wide / (1 + (-wide).exp_())).to(x.dtype)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """As torch's; see `silu`."""
    wide = x.float() if x.dtype in _NARROW else x
    if approximate == "tanh":
        inner = (wide + 0.044715 * wide * wide * wide) * (2 / torch.pi) ** 0.5
        share = torch.tanh(inner)
    else:
        share = torch.erf(wide * 0.5**0.5)
    return (0.5 * wide * (1 + share)).to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """As torch's; see `silu`."""
    if x.dtype not in _ROW_TYPES:
        return torch.sigmoid(x, out=x.new_empty(0, dtype=torch.result_type(x, 1.0)))
    return (1 / (1 + (-x.float()).exp_())).to(x.dtype)


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """As torch's; see `silu`."""
    scaled = (x.float() if x.dtype in _NARROW else x) * beta
    bent = scaled.clamp(max=threshold).exp().log1p() / beta
    return torch.where(scaled > threshold, x, bent.to(x.dtype))
