"""Tiny random models of several families, and packed micro-batches for them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from omnilit.types import IGNORE, MicroBatch, Origin

VOCAB = 256
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # gradients that are not trivially small
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in {**BASE, **more}.items() if key not in names}


def _deepseek_v3() -> hf.PreTrainedConfig:
    return hf.DeepseekV3Config(
        **_without(
            "head_dim",
            **_MOE,
            num_key_value_heads=4,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        )
    )


def _deepseek_v2() -> hf.PreTrainedConfig:
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 16, "v_head_dim": 16, "num_key_value_heads": 4}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return hf.DeepseekV2Config(**_without("head_dim", **_MOE, **sizes, **heads, **experts))


def _gpt_oss() -> hf.PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}
    return hf.GptOssConfig(**_without(**sizes, intermediate_size=32, rope_parameters=rope))


# One layer of linear attention whose heads differ in number and width, one of full attention
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


def _with_delta(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sections = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return {**BASE, **_DELTA, "rope_parameters": rope | sections, **more}


def _delta_moe() -> dict[str, Any]:
    return {**_MOE, "num_experts": 8, "shared_expert_intermediate_size": 32}


def _llama4() -> hf.PreTrainedConfig:
    sizes: dict[str, Any] = {"attention_chunk_size": 6, "num_local_experts": 4}
    sizes |= {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    return hf.Llama4TextConfig(**BASE, **sizes, intermediate_size_mlp=64)


def _phimoe() -> hf.PreTrainedConfig:
    sizes = {"num_local_experts": 4, "sliding_window": 6, "router_jitter_noise": 0.0}
    return hf.PhimoeConfig(**_without("head_dim", **sizes))


_CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "qwen3": lambda: hf.Qwen3Config(**BASE, tie_word_embeddings=False),
    "qwen3_tied": lambda: hf.Qwen3Config(**BASE, tie_word_embeddings=True),
    "llama": lambda: hf.LlamaConfig(**BASE),
    "qwen2": lambda: hf.Qwen2Config(**_without("head_dim")),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**BASE, **_MOE, num_experts=8, norm_topk_prob=True),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **BASE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma2": lambda: hf.Gemma2Config(**BASE, sliding_window=8),  # caps scores and logits
    "phi": lambda: hf.PhiConfig(**_without("head_dim")),  # a bias everywhere, in the head too
    "phi3": lambda: hf.Phi3Config(**_without("head_dim")),  # projections joined in one matrix
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(**_with_delta()),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeTextConfig(
        **{k: v for k, v in _with_delta(**_delta_moe()).items() if k != "intermediate_size"}
    ),
    "qwen3_next": lambda: hf.Qwen3NextConfig(**_with_delta(**_delta_moe())),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**_without("head_dim", **_DELTA)),
    "cohere": lambda: hf.CohereConfig(**_without("head_dim"), logit_scale=0.3),  # logits times that
    "granite": lambda: hf.GraniteConfig(**_without("head_dim"), logits_scaling=3.0),  # by that
    # its head is inside of another module, and its positions begin behind the one of padding
    "roberta": lambda: hf.RobertaConfig(**_without("head_dim"), is_decoder=True, **_NO_DROPOUT),
    "stablelm": lambda: hf.StableLmConfig(**_without("head_dim")),  # keeps bounds to itself
    "llama4": _llama4,  # sees its sequence in chunks
    "phimoe": _phimoe,  # leaves its window to a mask
}


def tiny_config(name: str, **over: Any) -> hf.PreTrainedConfig:
    """The configuration of family `name`: 2 layers, hidden 64, vocabulary 256."""
    config = _CONFIGS[name]()
    for key, value in over.items():
        setattr(config, key, value)
    return config


def tiny(name: str, *, seed: int = 0, **over: Any) -> hf.PreTrainedModel:
    """A float32 model in training mode, the same for the same seed, computing eagerly.

    Norms, biases and sinks are moved off their trivial initial values.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(tiny_config(name, **over))
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def random_labels(
    ids: Tensor, bounds: Sequence[int], *, keep: float, generator: torch.Generator
) -> Tensor:
    """The next tokens of packed ones [1, T], a share `keep` of them, none from the next segment."""
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    labels[torch.rand(labels.shape, generator=generator) >= keep] = IGNORE
    labels[0, [end - 1 for end in bounds[1:]]] = IGNORE
    return labels


def packed_batch(
    lengths: Sequence[int], *, seed: int = 0, keep: float = 0.7, vocab: int = VOCAB
) -> MicroBatch:
    """Segments of random tokens in one row, a share `keep` of them supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (sum(lengths),), generator=generator)
    return packed_row(ids.split(list(lengths)), keep=keep, generator=generator)


def packed_row(
    sequences: Sequence[Tensor],
    *,
    keep: float,
    generator: torch.Generator,
    media: Mapping[str, Tensor] | None = None,
) -> MicroBatch:
    """These sequences of tokens in one row, a share `keep` of them supervised, with their media."""
    lengths = [len(one) for one in sequences]
    ids, bounds = torch.cat(list(sequences))[None], [0, *accumulate(lengths)]
    labels = random_labels(ids, bounds, keep=keep, generator=generator)
    return MicroBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        bounds=bounds,
        origins=tuple(Origin("tiny", "tiny.jsonl", row + 1) for row in range(len(lengths))),
        counts={"tokens": int((labels != IGNORE).sum())},
        media=media or {},
    )


def reference_loss(model: hf.PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The mean loss of `batch` by transformers alone, one sequence at a time."""
    total = torch.zeros(())
    for a, b in zip(batch.bounds, batch.bounds[1:], strict=False):
        logits = model(input_ids=batch.input_ids[:, a:b], use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0].float(), batch.labels[0, a:b], ignore_index=IGNORE, reduction="sum"
        )
    return total / max(1, batch.counts["tokens"])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one, by name, as copies."""
    named = model.named_parameters()
    return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a tensor relative to its largest entry; inf for NaN or names."""
    if found.keys() != expected.keys() or not expected:
        return float("inf")
    worst = 0.0
    for name, reference in expected.items():
        scale = reference.abs().max().clamp(min=1e-8)
        difference = float((found[name] - reference).abs().max() / scale)
        worst = max(worst, float("inf") if math.isnan(difference) else difference)
    return worst
