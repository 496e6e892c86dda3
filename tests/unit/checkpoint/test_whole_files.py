"""Omni checkpoints as the hub has them, written and read by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from omnilit.checkpoint.hf import export
from omnilit.checkpoint.whole_files import find_whole_files
from omnilit.models.architecture import choose_towers
from omnilit.models.build import build_meta, load_model_config
from omnilit.models.weights import gather_weights, load_weights
from tests.helpers.media_models import media_config

HEAD = "thinker.lm_head.weight"
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def whole_config(name: str) -> hf.PreTrainedConfig:
    """A thinker with everything that speaks beside it."""
    if name == "qwen2_5_omni":
        talker = {**SIZES, **HEADS, "vocab_size": 64, "embedding_size": 64, "rope_parameters": ROPE}
        dit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
        encoder = {"enc_channels": [16] * 5, "enc_dim": 16, "enc_attention_channels": 8}
        wave = {
            "dit_config": {**dit, **encoder, "emb_dim": 16, "num_embeds": 64},
            "bigvgan_config": {"upsample_initial_channel": 64, "mel_dim": 16},
        }
        thinker = media_config("qwen2_5_omni_thinker")
        return hf.Qwen2_5OmniConfig(
            thinker_config=thinker, talker_config=talker, token2wav_config=wave
        )
    text = {**SIZES, **HEADS, "vocab_size": 64, "rope_parameters": ROPE, "num_experts": 2}
    text |= {"shared_expert_intermediate_size": 16, "moe_intermediate_size": 16}
    codes = {**SIZES, **HEADS, "vocab_size": 64, "num_code_groups": 2}
    return hf.Qwen3OmniMoeConfig(
        thinker_config=media_config("qwen3_omni_moe_thinker"),
        talker_config={
            "text_config": text,
            "code_predictor_config": codes,
            "spatial_merge_size": 2,
            "thinker_hidden_size": 64,
            "num_code_groups": 2,
        },
        code2wav_config={**SIZES, "decoder_dim": 32, "num_attention_heads": 4, "codebook_size": 32},
    )


def whole_class(name: str) -> type[hf.PreTrainedModel]:
    kinds = {
        "qwen2_5_omni": hf.Qwen2_5OmniForConditionalGeneration,
        "qwen3_omni_moe": hf.Qwen3OmniMoeForConditionalGeneration,
    }
    return kinds[name]


def save_whole(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a random whole in several files, as its own class does; returns what it reads again."""
    torch.manual_seed(0)
    model = whole_class(name)._from_config(whole_config(name), dtype=torch.float32)
    for parameter in model.parameters():  # the talker's experts are left as memory was
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="300KB")
    if name == "qwen2_5_omni":  # which is not loaded without its voices
        torch.save({}, folder / "spk_dict.pt")
    return whole_class(name).from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_of_a_whole_is_trained_and_the_export_is_whole_again(name, tmp_path):
    source = tmp_path / "source"
    before = save_whole(name, source)
    assert len(list(source.glob("*.safetensors"))) > 1
    config = choose_towers(load_model_config(None, str(source), trust_remote_code=False))
    assert config.model_type == f"{name}_thinker"
    model = build_meta(config, dtype=torch.float32)
    load_weights(model, config, path=str(source), seed=0, device=torch.device("cpu"))
    tensors = gather_weights(model)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, before[f"thinker.{key}"]), key
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    target = tmp_path / "hf_ckpt"
    whole = find_whole_files(str(source))
    assert whole is not None
    export(config, tensors, None, target, dtype=torch.float32, shards=whole)
    after = whole_class(name).from_pretrained(target).state_dict()
    assert after.keys() == before.keys()
    changed = [key for key, tensor in after.items() if not torch.equal(tensor, before[key])]
    assert changed == [HEAD]
    assert torch.equal(after[HEAD], before[HEAD] + 1)


def test_other_checkpoints_are_no_wholes(tmp_path):
    media_config("qwen3_vl").save_pretrained(tmp_path)
    assert find_whole_files(str(tmp_path)) is None
    assert find_whole_files(None) is None
