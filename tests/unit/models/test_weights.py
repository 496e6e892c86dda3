import json
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from omnilit.errors import ConfigError
from omnilit.models.build import build_meta
from omnilit.models.weights import (
    gather_weights,
    initial_tensors,
    load_buffers,
    load_weights,
    materialize,
    pretrained_tensors,
)
from omnilit.parallel.materialize import named_tensors, pieces

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE: dict[str, Any] = {
    **BASE,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**BASE),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**MOE),
    "gemma3": lambda: Gemma3TextConfig(**BASE, head_dim=16, sliding_window=8),
    "gpt_oss": lambda: GptOssConfig(
        **BASE,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**BASE, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=64, n_layer=8, n_head=4, n_positions=64),
}


def blueprint_of(family):
    return build_meta(CONFIGS[family](), dtype=torch.float32)


def plain_model(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)


@pytest.mark.parametrize("family", CONFIGS)
def test_random_start_has_the_distribution_of_plain_transformers(family):
    expected = named_tensors(plain_model(family))
    drawn = dict(initial_tensors(blueprint_of(family), seed=1))
    assert drawn.keys() == expected.keys()
    for name, plain in expected.items():
        ours = drawn[name]
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype), name
        if plain.numel() == 1 or plain.std() == 0 or name.endswith("inv_freq"):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0, msg=name)
            continue
        if plain.numel() < 64:  # too few for statistics: six times the initializer_range
            assert 0 < ours.abs().max() < 0.12, name
            continue
        error = 6 * plain.std() / plain.numel() ** 0.5  # six standard errors
        assert abs(ours.mean() - plain.mean()) < 2 * error, name
        assert abs(ours.std() - plain.std()) < error, name
        assert not torch.equal(ours, plain), name


def test_a_weight_that_a_parent_rescales_gets_the_parents_value():
    drawn = dict(initial_tensors(blueprint_of("gpt2"), seed=1))
    std = drawn["transformer.h.0.mlp.c_proj.weight"].std()
    assert std == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.03)


def test_random_start_depends_on_the_seed_and_the_name_alone():
    one, again = (dict(initial_tensors(blueprint_of("qwen3"), seed=1)) for _ in range(2))
    other = dict(initial_tensors(blueprint_of("qwen3"), seed=2))
    weights = [n for n, t in one.items() if t.numel() > 1 and "norm" not in n and "freq" not in n]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in weights)
    assert len({one[name].flatten()[0].item() for name in weights}) == len(weights)


def test_random_start_leaves_the_random_state_and_the_blueprint_alone():
    blueprint, state = blueprint_of("qwen3"), torch.get_rng_state()
    list(initial_tensors(blueprint, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in named_tensors(blueprint).values())
    assert blueprint.lm_head.weight is blueprint.model.embed_tokens.weight


def test_a_parameter_without_an_initial_value_is_refused():
    class Odd(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.ones(4))
            self.post_init()

    with torch.device("meta"):
        odd = Odd(LlamaConfig(**BASE))
    with pytest.raises(ConfigError, match=r"Odd gives scale no initial value.*give model_path"):
        list(initial_tensors(odd, seed=1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_weights_of_a_folder_give_the_logits_of_plain_transformers(family, tmp_path):
    plain = plain_model(family)
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = blueprint_of(family)
    load_weights(model, CONFIGS[family](), path=str(tmp_path), seed=1, device=CPU)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def edit_file(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    return tmp_path


def read(folder, *, strict=True, family="llama"):
    blueprint = blueprint_of(family)
    tensors = pretrained_tensors(str(folder), blueprint=blueprint, seed=3, strict=strict)
    return {name: values[next(pieces(values.shape, None))] for name, values in tensors}


def test_a_file_without_a_weight_is_refused_by_its_name(saved):
    edit_file(saved, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"model.model_path: .* lack model\.norm\.weight"):
        read(saved)


def test_a_file_with_a_foreign_weight_is_refused_by_its_name(saved):
    edit_file(saved, lambda t: t.update({"model.odd.weight": torch.zeros(2)}))
    with pytest.raises(ConfigError, match=r"without a place in the model, model\.odd\.weight"):
        read(saved)


def test_a_file_with_another_shape_is_refused_with_both_shapes(saved):
    edit_file(saved, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight \[3\] instead of \[64\]"):
        read(saved)


def test_a_long_list_of_names_is_cut_with_its_count(saved):
    edit_file(saved, lambda t: [t.pop(n) for n in list(t) if "layers" in n])
    with pytest.raises(ConfigError, match=r"lack 18 tensors: .* and 10 more"):
        read(saved)


def test_without_strict_what_is_missing_starts_like_an_untrained_model(saved, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    edit_file(saved, lambda t: (t.pop("model.embed_tokens.weight"), t.update(odd=torch.ones(1))))
    loaded = read(saved, strict=False)
    drawn = dict(initial_tensors(blueprint_of("llama"), seed=3))
    name = "model.embed_tokens.weight"
    assert torch.equal(loaded[name], drawn[name])
    assert torch.equal(loaded["lm_head.weight"], plain_model("llama").lm_head.weight)
    assert f"{name} start at random" in caplog.text
    assert "without a place in the model, odd" in caplog.text


def test_files_that_differ_where_the_model_ties_are_refused(tmp_path):
    torch.manual_seed(0)
    untied = Qwen3Config(**BASE, head_dim=16, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(untied, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"ties it to, lm_head\.weight"):
        read(tmp_path, family="qwen3")


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_a_folder_without_readable_weights_is_refused(tmp_path, content):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    if content:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.model_path: no weights can be loaded from"):
        read(tmp_path)


def test_a_torn_index_is_refused(tmp_path):
    plain_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / next(iter(content["weight_map"].values()))).unlink()
    with pytest.raises(ConfigError, match="no weights can be loaded from"):
        read(tmp_path)


def test_materialize_keeps_what_is_real_and_what_is_tied():
    model: Any = nn.ModuleDict(
        {"a": nn.Linear(2, 2, device="meta"), "b": nn.Linear(2, 2, device="meta")}
    )
    model["b"].weight = model["a"].weight
    model["real"] = nn.Linear(2, 2)
    before = model["real"].weight.clone()
    materialize(model, CPU)
    assert model["b"].weight is model["a"].weight
    assert torch.equal(model["real"].weight, before)
    assert not any(p.is_meta for p in model.parameters())


def test_offloaded_parameters_get_host_memory_and_buffers_that_of_the_device():
    model, device = blueprint_of("qwen3"), torch.device("meta")
    materialize(model, device, is_offloaded=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_buffers_alone_are_right_after_a_resume(family):
    model, plain = blueprint_of(family), plain_model(family)
    load_buffers(model, CONFIGS[family](), device=CPU)
    expected = dict(plain.named_buffers())
    assert dict(model.named_buffers()).keys() == expected.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_gathered_weights_are_what_a_checkpoint_needs(family):
    plain = plain_model(family)
    gathered = gather_weights(plain)
    saved = plain.state_dict()
    assert gathered.keys() == saved.keys() - plain.all_tied_weights_keys.keys()
    assert all(torch.equal(gathered[name], saved[name]) for name in gathered)
    assert not any(gathered[n].data_ptr() == saved[n].data_ptr() for n in gathered)
