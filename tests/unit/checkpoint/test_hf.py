import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CamembertConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from omnilit.checkpoint.hf import choose_export_dtype, export
from omnilit.checkpoint.manifest import find_damage
from omnilit.errors import CheckpointError, ConfigError
from omnilit.models.weights import gather_weights

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "head_dim": 16,
}
_TWO: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "tied": lambda: Qwen3Config(**BASE, tie_word_embeddings=True),
    # this class makes its head before its embedding, so the weight has the head's name
    "head first": lambda: CamembertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, is_decoder=True, **_TWO
    ),
    "untied": lambda: Qwen3Config(**BASE, tie_word_embeddings=False),
    "experts": lambda: Qwen3MoeConfig(
        **BASE, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
}


def plain(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_gives_the_same_logits_on_the_export(kind, dtype, tmp_path):
    gathered = gather_weights(plain(kind))
    export(CONFIGS[kind](), gathered, None, tmp_path / "hf_ckpt", dtype=dtype)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    model.load_state_dict(gathered, strict=False)  # copies, casting as it goes; keeps the ties
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_ckpt", dtype="auto")
    assert again.dtype == dtype
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert (again.eval()(ids).logits - expected).abs().max() == 0


def keys_of(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_experts_are_split_as_on_the_hub_and_tied_weights_written_once(tmp_path):
    for kind in ("experts", "tied"):
        export(
            CONFIGS[kind](),
            gather_weights(plain(kind)),
            None,
            tmp_path / kind,
            dtype=torch.float32,
        )
    experts = {k for k in keys_of(tmp_path / "experts") if "layers.0.mlp.experts" in k}
    prefix = "model.layers.0.mlp.experts"
    assert experts == {
        f"{prefix}.{i}.{name}_proj.weight" for i in range(4) for name in ("gate", "up", "down")
    }
    assert "lm_head.weight" not in keys_of(tmp_path / "tied")


def test_the_export_is_sealed_and_holds_the_models_own_config(tmp_path):
    config = CONFIGS["tied"]()
    export(config, gather_weights(plain("tied")), None, tmp_path / "hf", dtype=torch.bfloat16)
    assert find_damage(tmp_path / "hf") is None
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["dtype"], written["architectures"]) == ("bfloat16", ["Qwen3ForCausalLM"])
    assert not [key for key in written if "implementation" in key]
    assert config.dtype is None


def test_tokenizer_template_and_generation_settings_come_along(tmp_path):
    backend = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a")
    tokenizer.chat_template = "{{ messages[0].content }}"
    export(
        CONFIGS["tied"](),
        gather_weights(plain("tied")),
        tokenizer,
        tmp_path / "hf",
        dtype=torch.float32,
        generation_config=GenerationConfig(do_sample=True, top_k=7),
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (again.chat_template, len(again)) == (tokenizer.chat_template, 2)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").top_k == 7


def test_an_export_with_a_tensor_missing_is_refused_and_leaves_nothing(tmp_path):
    tensors = gather_weights(plain("untied"))
    tensors.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"1 are missing \(lm_head\.weight\)"):
        export(CONFIGS["untied"](), tensors, None, tmp_path / "hf", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_range_of_float16_are_refused_and_others_are_exported(tmp_path):
    tensors = gather_weights(plain("tied"))
    config = CONFIGS["tied"]()
    export(config, tensors, None, tmp_path / "good", dtype=torch.float16)
    with safe_open(tmp_path / "good" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float16
    tensors["model.norm.weight"][3] = 70_000.0
    with pytest.raises(CheckpointError, match=r"up to 65504, and model\.norm\.weight has larger"):
        export(config, tensors, None, tmp_path / "hf", dtype=torch.float16)
    assert not (tmp_path / "hf").exists()


def test_an_export_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    destination = tmp_path / "file" / "hf"
    with pytest.raises(CheckpointError, match=r"the export to .*file/hf failed"):
        export(
            CONFIGS["tied"](),
            gather_weights(plain("tied")),
            None,
            destination,
            dtype=torch.float32,
        )


@pytest.mark.parametrize(
    ("name", "own", "is_loaded", "expected"),
    [
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "bfloat16", False, torch.float32),
        ("auto", None, True, torch.float32),
        ("float16", "bfloat16", True, torch.float16),
    ],
)
def test_the_export_dtype_is_that_of_the_weights_training_started_from(
    name, own, is_loaded, expected
):
    config = LlamaConfig(dtype=own)
    found = choose_export_dtype(name, config=config, is_loaded=is_loaded, master=torch.float32)
    assert found == expected


def test_an_export_dtype_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"'int8' is not known.*auto, bfloat16, float32, float16"):
        choose_export_dtype("int8", config=LlamaConfig(), is_loaded=False, master=torch.float32)
