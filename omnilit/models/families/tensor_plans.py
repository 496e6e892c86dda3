"""Tensor parallel plans of families that transformers has none for, in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from transformers import PreTrainedConfig

# Added on each rank to a sum over ranks: each adds its share. Ours; the other styles are theirs.
SHARED_BIAS: Final = "shared_bias"
OWN_HEADS: Final = "replicated_with_grad_allreduce"  # whole on each rank, used on its part

_GPT_OSS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.self_attn": "local_params",
        # [E, D, 2 I] with gate and up by turns, so that any even part of the last dimension is
        # a part of both; then [E, I, D].
        "layers.*.mlp.experts.gate_up_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj_bias": "rowwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts.down_proj_bias": SHARED_BIAS,
        "layers.*.mlp.experts": "moe_tp_experts",
    }
)

# A number a layer that every rank applies to its own part of the activations
_APERTUS: Final[Mapping[str, str]] = MappingProxyType({"layers.*.mlp.act_fn": OWN_HEADS})

# Of heads, of which each rank has a part
_HEAD_NORMS: Final[Mapping[str, str]] = MappingProxyType(
    {"layers.*.self_attn.q_norm": OWN_HEADS, "layers.*.self_attn.k_norm": OWN_HEADS}
)
_QWEN3_VL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        **_HEAD_NORMS,
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
)

_PLANS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "apertus": _APERTUS,
        "gpt_oss": _GPT_OSS,
        "qwen3_omni_moe_text": _HEAD_NORMS,
        "qwen3_vl_text": _QWEN3_VL,
        "qwen3_vl_moe_text": _HEAD_NORMS,
    }
)
_EMBEDDING: Final = "its code reads a row of the embedding itself, which only one rank has"
# Families whose plan does not give the numbers of one process, or does not run
_UNSPLIT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gemma3n_text": "its activations are held against the mean of a whole row of them",
        "gemma4": _EMBEDDING,
        "gemma4_unified": _EMBEDDING,
        "llama4_text": "its code adds to the output of a split matrix in place",
    }
)


def plan_of(config: PreTrainedConfig) -> Mapping[str, str]:
    """Style by module or parameter of the base model, layers as `*`; empty where none is needed."""
    return _PLANS.get(config.model_type, MappingProxyType({}))


def why_unsplit(config: PreTrainedConfig) -> str:
    """Why the plan of a model cannot be used; empty where it can.

    Args:
        config: Of the whole model.
    """
    types = (config.model_type, config.get_text_config(decoder=True).model_type)
    return next((_UNSPLIT[name] for name in types if name in _UNSPLIT), "")
