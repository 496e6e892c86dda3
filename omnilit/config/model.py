"""`model.ops_implementation`: which kernel computes which operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OpsImplementationConfig:
    """The kernel of each operation; plain names, so that a plugin can register its own.

    Args:
        attn_implementation: Kernel under the packed attention: eager, sdpa, flash_attention_2,
            flash_attention_3, flash_attention_4 or flex_attention.
        moe_implementation: Forward of the experts: eager loops over them, fused_triton (sm_70 and
            newer), fused_quack (sm_90 and newer) and fused_npu group their matrix products.
        cross_entropy_loss_implementation: Head and loss in one: liger_kernel (GPU), chunk_loss
            (any device), npu (another name for chunk_loss there) or eager (full logits).
        rms_norm_implementation: liger_kernel (GPU), npu, triton (DeepSeek-V3 only) or eager.
        swiglu_mlp_implementation: liger_kernel (GPU) or eager; there is none for NPU.
        rotary_pos_emb_implementation: liger_kernel (GPU), npu, triton (DeepSeek-V3 only) or eager.
        load_balancing_loss_implementation: The router's balance loss: triton or eager.
        rms_norm_gated_implementation: Gated norm of linear attention: fla (GPU) or eager.
        causal_conv1d_implementation: Convolution before linear attention: fla (GPU) or eager.
        chunk_gated_delta_rule_implementation: The delta rule of linear attention: fla, flash_qla
            (both GPU) or eager.
        preset: Fills the fields of this group that are not given: auto takes the default above
            where this machine can run it, else the best that it can; reference takes the defaults
            literally; eager and npu take those backends.
    """

    attn_implementation: str | None = "flash_attention_2"
    moe_implementation: str = "fused_triton"
    cross_entropy_loss_implementation: str = "liger_kernel"
    rms_norm_implementation: str = "liger_kernel"
    swiglu_mlp_implementation: str = "liger_kernel"
    rotary_pos_emb_implementation: str = "liger_kernel"
    load_balancing_loss_implementation: str = "triton"
    rms_norm_gated_implementation: str = "fla"
    causal_conv1d_implementation: str = "fla"
    chunk_gated_delta_rule_implementation: str = "fla"
    preset: Literal["auto", "reference", "eager", "npu"] = "auto"
