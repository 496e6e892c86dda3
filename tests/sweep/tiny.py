"""A tiny configuration of any causal language model that transformers has, or one with towers.

The default configuration of an architecture is shrunk field by field: what is a size gets a small
one, lists with an entry a layer keep one layer of each kind, and the rest stays as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCAB: Final = 128
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 2
EXPERTS, TOP_K = 4, 2
MAX_KINDS: Final = 4  # of layers that are kept
_NAMES: Final = (
    (
        VOCAB,
        (
            "vocab_size unpadded_vocab_size vocab_size_per_layer_input max_position_embeddings "
            "n_positions n_ctx max_seq_len max_target_positions max_source_positions "
            "context_length position_bias_max_distance model_max_length"
        ),
    ),
    (
        HIDDEN,
        (
            "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim "
            "input_embedding_size output_embedding_size attention_hidden_size lru_width "
            "dim_model_base adapter_input_size adapter_in_dim adapter_out_dim hidden_dim "
            "query_pre_attn_scalar swa_hidden_size d_embed out_hidden_size text_hidden_size "
            "output_dim embed_dim projection_dim encoder_hidden_size mm_hidden_size "
            "downsample_hidden_size projector_hidden_size projection_hidden_size"
        ),
    ),
    (
        48,
        (
            "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff "
            "d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size "
            "projector_intermediate_size"
        ),
    ),
    (
        24,
        (
            "moe_intermediate_size shared_expert_intermediate_size "
            "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
            "expert_ffn_hidden_size shared_intermediate_size"
        ),
    ),
    (
        HEADS,
        (
            "num_attention_heads num_heads n_head n_heads attention_heads decoder_attention_heads "
            "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
            "swa_num_attention_heads num_key_value_heads linear_num_heads linear_num_value_heads "
            "mamba_n_heads mamba_num_heads indexer_n_heads n_mamba_heads index_n_heads "
            "num_query_groups rotary_dim"
        ),
    ),
    (
        2,
        ("linear_num_key_heads mamba_n_groups mamba_ngroups o_groups n_groups"),
    ),
    (
        HEAD_DIM,
        (
            "head_dim indexer_head_dim indexer_budget swa_head_dim global_head_dim d_head "
            "dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_head_dim "
            "linear_key_head_dim linear_value_head_dim attention_head_size index_head_dim "
            "kv_channels mamba_headdim mamba_head_dim mamba_d_head hidden_size_per_layer_input "
            "ple_embed_dim state_size ssm_state_size mamba_d_state router_hidden_size "
            "sliding_window sliding_window_size attention_chunk_size window_size local_attention "
            "chunk_size mamba_chunk_size block_size index_topk keep_window_size "
            "attention_window_size expert_head_dim index_block_size"
        ),
    ),
    (64, ("num_position_embeddings pos_emb_height pos_emb_width")),
    (
        16,
        (
            "image_size num_mel_bins "
            "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank laurel_rank adapter_rank "
            "gated_norm_rank d_rel rel_extent attention_head_dim mamba_dt_rank time_step_rank "
            "hc_lowrank"
        ),
    ),
    (
        LAYERS,
        (
            "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
            "num_decoder_layers num_encoder_layers indexer_compress_ratio depth "
            "num_layers_per_stack num_blocks"
        ),
    ),
    (4, ("patch_size")),
    (
        EXPERTS,
        ("num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    ),
    (
        TOP_K,
        (
            "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts n_group "
            "num_expert_group"
        ),
    ),
    (
        1,
        (
            "topk_group indexer_kv_heads n_shared_experts num_shared_experts "
            "moe_num_shared_experts moe_layer_end_index first_k_dense_replace num_dense_layers "
            "index_topk_blocks"
        ),
    ),
    (
        0,
        ("num_nextn_predict_layers num_kv_shared_layers pad_token_id insert_layer_id"),
    ),
)
SIZES: Final = {name: size for size, names in _NAMES for name in names.split()}
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")
# Fields that are None by default and sizes in any real model, or switch something on
_FILLED: Final = frozenset(
    {
        *("head_dim", "num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok"),
        *(
            "n_routed_experts",
            "n_shared_experts",
            "sliding_window",
            "indexer_n_heads",
            "indexer_kv_heads",
        ),
        *("indexer_head_dim", "indexer_budget", "indexer_compress_ratio"),
    }
)
# Lists of another length than there are layers
_LISTS: Final[Mapping[str, list[Any]]] = {
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
}
_CHANCE: Final = re.compile(r"drop|jitter|noise")  # what makes two runs differ
_OUTSIDE: Final = -2  # a token that the small vocabulary does not have
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of `model_type`, a key of transformers' mapping, with small sizes.

    Raises:
        Exception: Whatever the configuration's own code raises about it.
    """
    known = CONFIG_MAPPING[model_type]
    config = known(**_shrunk(known(), _EXTRA.get(model_type, {})))
    for part in _parts(config):
        for name, value in vars(part).items():
            if _CHANCE.search(name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _shrunk(config: PreTrainedConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a default configuration that are made smaller, with their new values.

    Args:
        config: Of the whole model or a part.
        extra: What is given instead; of parts likewise.
    """
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    kept = _kept_layers(config)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if _is_part(value):
            small[name] = type(value)(**_shrunk(value, extra.get(name, {})))
        elif name in _LISTS and value is not None:
            small[name] = _LISTS[name]
        elif isinstance(value, list | tuple) and name in ("image_size", "patch_size"):
            small[name] = [SIZES[name]] * len(value)
        elif isinstance(value, list) and kept is not None and len(value) == _num_layers(config):
            small[name] = [_small_entry(name, value[layer]) for layer in kept]
        elif isinstance(value, dict) and name.startswith("rope_"):
            small[name] = _small_rope(value)
        elif name == "is_decoder":
            small[name] = True
        elif value is None and name in _FILLED:
            small[name] = SIZES[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _small_size(name, value, fields, kept)
    taken = [name for name in fields if _is_token(name) and small.get(name) == _OUTSIDE]
    whole = {
        name: value
        for name, value in extra.items()
        if name not in fields or not _is_part(fields[name])
    }
    return small | {name: number + 2 for number, name in enumerate(taken)} | whole


def _is_token(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "im_start_id", "im_end_id", "im_newline_id"))


def _is_part(value: object) -> bool:
    return isinstance(value, PreTrainedConfig)


def _small_size(
    name: str, value: int, fields: Mapping[str, Any], kept: Sequence[int] | None
) -> int:
    if name in _KV_HEADS:
        return _kv_heads(fields, value)
    if name in _LAYERS and kept is not None:
        return len(kept)
    if _is_token(name) and name not in SIZES:
        return value if value < VOCAB else _OUTSIDE
    return min(value, SIZES.get(name, value))


def _small_entry(name: str, value: Any) -> Any:
    return HEADS if name.startswith("num_attention_heads") else value


def _num_layers(config: PreTrainedConfig) -> int:
    return next((n for name in _LAYERS if (n := getattr(config, name, None))), 0)


def _kept_layers(config: PreTrainedConfig) -> list[int] | None:
    """One layer of each kind, two at least; None where no list tells kinds apart."""
    number = _num_layers(config)
    lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == number]
    if not number or not lists:
        return None
    first: dict[str, int] = {}
    for layer in range(number):
        first.setdefault(repr([values[layer] for values in lists]), layer)
    kept = sorted(first.values())[:MAX_KINDS]
    return kept if len(kept) > 1 else list(range(min(LAYERS, number)))


def _kv_heads(fields: Mapping[str, Any], value: int) -> int:
    heads = next((n for name in _HEADS if isinstance(n := fields.get(name), int)), value)
    return HEADS if value >= heads else KV_HEADS


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    small = copy.deepcopy(rope)
    for part in [small, *(v for v in small.values() if isinstance(v, dict))]:
        if "mrope_section" in part:
            part["mrope_section"] = [2, 1, 1]
        for name in ("long_factor", "short_factor"):
            if name in part:
                part[name] = part[name][: HEAD_DIM // 2]
        if "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = VOCAB // 2
    return small


_MAMBA: Final = {"mamba_n_heads": HEADS, "mamba_d_head": 2 * HIDDEN // HEADS}
_SWA: Final = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 2 * HEAD_DIM,
    "swa_qk_nope_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
}
_GEMMA4: Final = {"top_k_experts": TOP_K, "moe_intermediate_size": 24}
_ROPE: Final = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS: Final = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}}
_WHOLE: Final = {
    "text_config": {
        "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    }
}
# What the sizes above do not say
_EXTRA: Final[Mapping[str, dict[str, Any]]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": _MAMBA,
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [2, 1, 1]}}
        }
    },
    "chameleon": {"vocabulary_map": {"<image>": 2, "IMGIMGAZ": 3}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {
            "sam_config": {"downsample_channels": [HIDDEN, HIDDEN], "global_attn_indexes": [0, 1]}
        },
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
    "emu3": {
        "vocabulary_map": {
            "<image>": 2,
            "<|extra_200|>": 3,
            **{f"<|visual token {n:06}|>": 10 + n for n in range(8)},
        },
        "vq_config": {
            "codebook_size": 8,
            "base_channels": HIDDEN,
            "channel_multiplier": [1, 1],
            "attn_resolutions": [],
        },
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "glm46v": _WHOLE,
    "glm4v": _WHOLE,
    "glm4v_moe": _WHOLE,
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "glm_ocr": _WHOLE,
    "glmga": _WHOLE,
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "diffusion_gemma": {"text_config": {"num_experts": EXPERTS, **_GEMMA4}},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
    "hunyuan_vl": _SECTIONS,
    "paddleocr_vl": _SECTIONS,
    "qwen2_5_omni_thinker": {**_SECTIONS, "vision_start_token_id": 10, "vision_end_token_id": 11},
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS,
    "qwen3_omni_moe_thinker": {**_SECTIONS, "vision_start_token_id": 10, "vision_end_token_id": 11},
    "qwen3_5": _WHOLE,
    "qwen3_5_moe": _WHOLE,
    "qwen3_vl": _SECTIONS,
    "qwen3_vl_moe": _SECTIONS,
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layer": [-1, -2, 0, 1, 2]},
    "minicpm_ocr": {"image_token_id": 2, "video_token_id": 3},
    "minicpmv4_6": {"image_token_id": 2, "video_token_id": 3},
    "minicpmv4_7": {"image_token_id": 2, "video_token_id": 3},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": KV_HEADS, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 48,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "dots3_note_text": _SWA,
    "flint": {"mlp_only_layers": [0]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 2 * HIDDEN},
    "gemma4_text": {"enable_moe_block": True, "num_experts": EXPERTS, **_GEMMA4},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": HEADS, "head_dim": 2 * HIDDEN // HEADS},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 2 * HIDDEN,
    },
    "zamba2": {"mamba_headdim": 2 * HIDDEN // HEADS},
}


def tiny_model(
    config: PreTrainedConfig, *, takes_media: bool = False, seed: int = 0
) -> PreTrainedModel:
    """A float32 model by transformers alone, in training mode, with eager attention.

    Matrices are drawn wide enough for gradients that are not trivially small; norms, biases and
    the like are moved off their initial zeros and ones.
    """
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if takes_media else AutoModelForCausalLM
    model = kind.from_config(
        copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()
