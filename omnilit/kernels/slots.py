"""All kernel slots, by the field of `ops_implementation` that chooses their backend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from omnilit.kernels.slot import OpSlot, Requirement

_KEY: Final = "model.ops_implementation"
_KERNELS: Final = "omnilit.kernels"
_OURS: Final = f"{_KERNELS}.triton"
_LIGER: Final = Requirement("cuda", packages=("liger-kernel", "triton"))
_FLA: Final = Requirement("cuda", packages=("flash-linear-attention", "triton"))
_TRITON: Final = Requirement("cuda", packages=("triton",))
_NPU: Final = Requirement("npu", packages=("torch-npu",))


def _attention() -> OpSlot:
    slot = OpSlot(
        "attention", key=f"{_KEY}.attn_implementation", eager=f"{_KERNELS}.attention:eager"
    )
    slot.register("sdpa", f"{_KERNELS}.attention:sdpa")
    for name, needs in {
        "flash_attention_2": Requirement("cuda", min_sm=80, packages=("flash-attn",)),
        "flash_attention_3": Requirement("cuda", 90, 90, ("flash-attn-3",)),
        "flash_attention_4": Requirement("cuda", min_sm=90, packages=("flash-attn-4",)),
    }.items():
        slot.register(name, f"{_KERNELS}.adapters.flash_attention:{name}", needs)
    # on a CPU torch has no backward of it
    needs = Requirement("cuda", min_sm=80, packages=("triton",))
    slot.register("flex_attention", f"{_KERNELS}.flex:flex_attention", needs)
    return slot


def _moe() -> OpSlot:
    slot = OpSlot("moe", key=f"{_KEY}.moe_implementation", eager=f"{_KERNELS}.moe:eager")
    slot.register("torch", f"{_KERNELS}.moe_by_expert:by_expert")
    slot.register("grouped_mm", f"{_KERNELS}.moe_grouped:grouped_mm", Requirement(min_sm=80))
    needs = Requirement("cuda", min_sm=70, packages=("triton",))
    slot.register("fused_triton", f"{_OURS}.moe:fused", needs)
    needs = Requirement("cuda", min_sm=90, packages=("quack-kernels",))
    slot.register("fused_quack", f"{_KERNELS}.adapters.quack:experts", needs)
    slot.register("fused_npu", f"{_KERNELS}.adapters.npu:experts", _NPU)
    return slot


def _cross_entropy() -> OpSlot:
    key = f"{_KEY}.cross_entropy_loss_implementation"
    slot = OpSlot("cross_entropy_loss", key=key, eager=f"{_KERNELS}.cross_entropy:eager")
    slot.register("chunk_loss", f"{_KERNELS}.cross_entropy:chunk_loss")
    slot.register("liger_kernel", f"{_KERNELS}.adapters.liger:cross_entropy", _LIGER)
    slot.register("npu", f"{_KERNELS}.cross_entropy:chunk_loss", _NPU)  # documented as an alias
    return slot


def _rms_norm() -> OpSlot:
    key = f"{_KEY}.rms_norm_implementation"
    slot = OpSlot("rms_norm", key=key, eager=f"{_KERNELS}.rms_norm:eager")
    slot.register("torch", f"{_KERNELS}.rms_norm:lean")
    slot.register("liger_kernel", f"{_KERNELS}.adapters.liger:rms_norm", _LIGER)
    slot.register("npu", f"{_KERNELS}.adapters.npu:rms_norm", _NPU)
    slot.register("triton", f"{_OURS}.rms_norm:rms_norm", _TRITON)
    return slot


def _swiglu() -> OpSlot:
    key = f"{_KEY}.swiglu_mlp_implementation"
    slot = OpSlot("swiglu_mlp", key=key, eager=f"{_KERNELS}.swiglu:eager")
    slot.register("liger_kernel", f"{_KERNELS}.adapters.liger:swiglu", _LIGER)
    return slot


def _rotary() -> OpSlot:
    key = f"{_KEY}.rotary_pos_emb_implementation"
    slot = OpSlot("rotary_pos_emb", key=key, eager=f"{_KERNELS}.rope:eager")
    slot.register("liger_kernel", f"{_KERNELS}.adapters.liger:rotary", _LIGER)
    slot.register("npu", f"{_KERNELS}.adapters.npu:rotary", _NPU)
    slot.register("triton", f"{_OURS}.rope:rotary", _TRITON)
    return slot


def _load_balancing() -> OpSlot:
    key = f"{_KEY}.load_balancing_loss_implementation"
    slot = OpSlot("load_balancing_loss", key=key, eager=f"{_KERNELS}.load_balancing:eager")
    needs = Requirement("accelerator", packages=("triton",))
    slot.register("triton", f"{_OURS}.load_balancing:sums", needs)
    return slot


def _linear_attention(name: str, others: Mapping[str, Requirement]) -> OpSlot:
    target = f"{_KERNELS}.linear_attention:{name}"
    slot = OpSlot(name, key=f"{_KEY}.{name}_implementation", eager=target)
    for backend, needs in others.items():
        slot.register(backend, f"{_KERNELS}.adapters.{backend}_kernels:{name}", needs)
    return slot


# Registries of names: plug-ins add backends to these slots.
ATTENTION: Final = _attention()
MOE: Final = _moe()
CROSS_ENTROPY: Final = _cross_entropy()
RMS_NORM: Final = _rms_norm()
SWIGLU: Final = _swiglu()
ROTARY: Final = _rotary()
LOAD_BALANCING: Final = _load_balancing()
RMS_NORM_GATED: Final = _linear_attention("rms_norm_gated", {"fla": _FLA})
CAUSAL_CONV1D: Final = _linear_attention("causal_conv1d", {"fla": _FLA})
GATED_DELTA_RULE: Final = _linear_attention(
    "chunk_gated_delta_rule",
    {"fla": _FLA, "flash_qla": Requirement("cuda", 90, 103, ("flash-qla",))},
)

SLOTS: Final[Mapping[str, OpSlot]] = MappingProxyType(
    {
        "attn_implementation": ATTENTION,
        "moe_implementation": MOE,
        "cross_entropy_loss_implementation": CROSS_ENTROPY,
        "rms_norm_implementation": RMS_NORM,
        "swiglu_mlp_implementation": SWIGLU,
        "rotary_pos_emb_implementation": ROTARY,
        "load_balancing_loss_implementation": LOAD_BALANCING,
        "rms_norm_gated_implementation": RMS_NORM_GATED,
        "causal_conv1d_implementation": CAUSAL_CONV1D,
        "chunk_gated_delta_rule_implementation": GATED_DELTA_RULE,
    }
)

# Asked of a machine only when a model with linear attention binds them.
BOUND_LATE: Final = frozenset(
    {
        "rms_norm_gated_implementation",
        "causal_conv1d_implementation",
        "chunk_gated_delta_rule_implementation",
    }
)

# What the general operations may be on an Ascend NPU, whatever the model.
NPU_ALLOW_LIST: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "moe_implementation": ("eager", "fused_npu"),
        "cross_entropy_loss_implementation": ("eager", "chunk_loss", "npu"),
        "rms_norm_implementation": ("eager", "npu"),
        "swiglu_mlp_implementation": ("eager",),
        "rotary_pos_emb_implementation": ("eager", "npu"),
        "load_balancing_loss_implementation": ("eager", "triton"),
    }
)
