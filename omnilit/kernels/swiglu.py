"""SwiGLU: the reference of the slot `swiglu_mlp`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def eager(gate: Tensor, up: Tensor) -> Tensor:
    """Gate `up`, both of shape [..., I], by the SiLU of `gate`."""
    return silu(gate) * up
