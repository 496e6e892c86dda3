"""Rotary position embedding: the reference of the slot `rotary_pos_emb`."""

from __future__ import annotations

import torch
from torch import Tensor


def eager(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate the halves of every head by its position, as Llama and its relatives do.

    The signature is that of transformers' `apply_rotary_pos_emb`, which backends stand in for.

    Args:
        q: Queries [B, N, T, H].
        k: Keys [B, K, T, H].
        cos: Cosines [B, T, H], the two halves equal.
        sin: Sines, likewise.
        unsqueeze_dim: Where the dimension of the heads stands in `q` and `k`.

    Returns:
        Rotated queries and keys.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + _turn(q) * sin, k * cos + _turn(k) * sin


def _turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
