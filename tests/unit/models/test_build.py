import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, T5Config

from omnilit.errors import ConfigError
from omnilit.models.build import (
    build_meta,
    check_tokenizer,
    load_model_config,
    load_tokenizer,
)

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def load(config_path, model_path=None):
    return load_model_config(
        config_path and str(config_path),
        model_path and str(model_path),
        trust_remote_code=False,
    )


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_a_file_and_the_model_path_give_the_same_config(folder):
    found = [load(folder), load(folder / "config.json"), load(None, folder)]
    assert {(type(c), c.vocab_size) for c in found} == {(LlamaConfig, 16)}


def test_no_path_at_all_is_refused():
    with pytest.raises(ConfigError, match=r"model\.config_path: neither .* give model_path"):
        load(None)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.config_path: the folder .* no config\.json"):
        load(tmp_path)


def test_a_bad_model_path_is_named_as_such(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.model_path: the folder"):
        load(None, tmp_path)


def test_torn_json_is_refused_with_its_place(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"config\.json is not readable JSON .*char 15"):
        load(folder)


def test_a_config_without_model_type_is_refused(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no model_type"):
        load(folder)


def test_an_unknown_model_type_is_refused_with_the_closest(folder):
    (folder / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(ConfigError, match=r"'lama' .* Did you mean 'llama'\?"):
        load(folder)


def test_a_bad_value_in_a_config_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "hidden_size": "big"}))
    with pytest.raises(ConfigError, match=r"is refused by transformers .*hidden_size"):
        load(folder)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no file or folder, nor reachable as hub"):
        load("nobody/nothing-of-this-name")
    with pytest.raises(ConfigError, match="is no file or folder, nor reachable as hub"):
        load(tmp_path / "gone")


def test_a_meta_model_has_its_own_config_and_takes_no_memory():
    config = LlamaConfig(**SIZES)
    model = build_meta(config, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model.config.vocab_size = 1
    assert (config.vocab_size, config.dtype) == (16, None)


def test_a_model_that_is_no_causal_lm_is_refused_by_its_architecture():
    config = T5Config(architectures=["T5ForConditionalGeneration"])
    with pytest.raises(ConfigError, match=r"T5ForConditionalGeneration \(t5\) is not a causal"):
        build_meta(config, dtype=torch.float32)


def save_tokenizer(folder, num_tokens):
    words = {f"w{i}": i for i in range(num_tokens)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)


def test_a_tokenizer_pads_on_the_right(tmp_path):
    save_tokenizer(tmp_path, 4)
    assert load_tokenizer(str(tmp_path), trust_remote_code=False).padding_side == "right"


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.tokenizer_path: no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


def test_a_folder_with_a_configuration_alone_is_not_taken_for_an_empty_tokenizer(tmp_path):
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer_path: .* holds no vocabulary of a tokenizer"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize("num_tokens", [4, 16])
def test_a_tokenizer_up_to_the_vocabulary_is_fine(tmp_path, num_tokens):
    save_tokenizer(tmp_path, num_tokens)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    check_tokenizer(tokenizer, LlamaConfig(**SIZES))


def test_a_tokenizer_beyond_the_vocabulary_is_refused_with_both_numbers(tmp_path):
    save_tokenizer(tmp_path, 17)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    with pytest.raises(ConfigError, match="has 17 tokens, the model's vocabulary 16"):
        check_tokenizer(tokenizer, LlamaConfig(**SIZES))
