"""FlashQLA's gated delta rule behind the signature of our slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from omnilit.errors import KernelError

TYPES: Final = (torch.bfloat16, torch.float16)


def chunk_gated_delta_rule(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_TNV: Tensor,
    log_decay_TN: Tensor,
    beta_TN: Tensor,
    *,
    bounds: Sequence[int],
) -> Tensor:
    """As `kernels.linear_attention.chunk_gated_delta_rule`.

    Raises:
        KernelError: The values are in float32, which the library has no kernel for.
    """
    from flash_qla import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule as rule,
    )

    if v_TNV.dtype not in TYPES:
        raise KernelError(
            key="model.ops_implementation.chunk_gated_delta_rule_implementation",
            problem=f"'flash_qla' computes in bfloat16, and this model in {v_TNV.dtype}",
            fix="set it to fla, or mixed_precision.enable: true",
        )
    # parts of one projection: its kernels read whole tensors
    q, k, v = (x[None].contiguous() for x in (q_TKD, k_TKD, v_TNV))
    ends = torch.tensor(bounds).to(v.device, non_blocking=True)
    log_decay, beta = log_decay_TN[None].contiguous(), beta_TN[None].contiguous()
    out, _ = rule(q, k, v, log_decay, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=ends)
    return out[0]
