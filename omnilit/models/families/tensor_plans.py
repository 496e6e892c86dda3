"""Tensor parallel plans of families that transformers has none for, in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from transformers import PreTrainedConfig

# Added on each rank to a sum over ranks: each adds its share. Ours; the other styles are theirs.
SHARED_BIAS: Final = "shared_bias"

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

_PLANS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType({"gpt_oss": _GPT_OSS})


def plan_of(config: PreTrainedConfig) -> Mapping[str, str]:
    """Style by module or parameter of the base model, layers as `*`; empty where none is needed."""
    return _PLANS.get(config.model_type, MappingProxyType({}))
