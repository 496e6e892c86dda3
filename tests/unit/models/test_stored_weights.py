"""Files read without rank 0: the same values, and the same refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from omnilit.errors import ConfigError
from omnilit.models import stored_weights
from omnilit.models.build import build_meta
from omnilit.models.stored_weights import read_own_weights
from omnilit.models.weights import Delivery, initial_tensors, load_weights, materialize
from omnilit.parallel.materialize import named_tensors
from tests.helpers.models import tiny, tiny_config

CPU = torch.device("cpu")
FAMILIES = ("qwen3", "qwen3_tied", "qwen3_moe", "gpt_oss", "deepseek_v3")


def load(folder, family="qwen3", *, from_rank0=False, strict=True) -> dict[str, Tensor]:
    model = build_meta(tiny_config(family), dtype=torch.float32)
    load_weights(
        model,
        tiny_config(family),
        path=str(folder),
        seed=1,
        device=CPU,
        strict=strict,
        delivery=Delivery(from_rank0=from_rank0),
    )
    return named_tensors(model)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("from_rank0", [True, False])
def test_every_tensor_is_what_transformers_reads(family, from_rank0, tmp_path):
    tiny(family).save_pretrained(tmp_path, max_shard_size="100KB")
    found = load(tmp_path, family, from_rank0=from_rank0)
    expected = named_tensors(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_of_another_dtype_are_cast_the_same_way(tmp_path):
    tiny("qwen3_moe").bfloat16().save_pretrained(tmp_path)
    found, expected = (load(tmp_path, "qwen3_moe", from_rank0=is_on) for is_on in (False, True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_head_that_stands_in_for_the_embedding_it_is_tied_to_is_taken(tmp_path):
    tiny("qwen3_tied").save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    found, expected = (load(tmp_path, "qwen3_tied", from_rank0=is_on) for is_on in (False, True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_conversion_that_splits_is_made_whole_and_cut_afterwards(saved, monkeypatch):
    names = [f"mlp.{part}_proj.weight" for part in ("gate", "up")]
    converter = WeightConverter("mlp.gate_up.weight", names, [Chunk(dim=0)])
    monkeypatch.setattr(stored_weights, "get_model_conversion_mapping", lambda _: [converter])
    expected = load_file(saved / "model.safetensors")

    def fuse(tensors):
        for layer in ("model.layers.0", "model.layers.1"):
            parts = [tensors.pop(f"{layer}.{name}") for name in names]
            tensors[f"{layer}.mlp.gate_up.weight"] = torch.cat(parts)

    edit(saved, fuse)
    found = load(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lack model\.norm\.weight"),
        (lambda t: t.update(odd=torch.ones(1)), r"without a place in the model, odd"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight \[3\] instead of \[64\]",
        ),
    ],
)
def test_files_that_do_not_match_are_refused_before_anything_is_read(saved, change, message):
    edit(saved, change)
    with pytest.raises(ConfigError, match=message):
        load(saved)


def test_experts_of_another_number_are_refused_with_both_shapes(tmp_path):
    tiny("qwen3_moe", num_experts=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"down_proj \[4, 64, 32\] instead of \[8, 64, 32\]"):
        load(tmp_path, "qwen3_moe")


def test_experts_of_different_shapes_cannot_be_stacked(tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    edit(tmp_path, lambda t: t.update({name: torch.ones(2, 2)}))
    with pytest.raises(ConfigError, match=r"experts\.down_proj cannot be converted: Error"):
        load(tmp_path, "qwen3_moe")


def test_a_tie_that_the_files_contradict_is_refused(tmp_path):
    tiny("qwen3_tied").save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ConfigError, match=r"ties it to, lm_head\.weight"):
        load(tmp_path, "qwen3_tied", strict=False)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(tmp_path, "qwen3_tied")


def test_without_strict_what_is_missing_starts_like_an_untrained_model(saved):
    edit(saved, lambda t: (t.pop("lm_head.weight"), t.update(odd=torch.ones(1))))
    found = load(saved, strict=False)
    drawn = dict(initial_tensors(build_meta(tiny_config("qwen3"), dtype=torch.float32), seed=1))
    assert torch.equal(found["lm_head.weight"], drawn["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], tiny("qwen3").state_dict()["model.norm.weight"])


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_a_folder_without_readable_weights_is_refused(tmp_path, content):
    if content:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.model_path: no weights can be loaded from"):
        load(tmp_path)


def test_one_process_reads_every_byte_of_every_tensor_once(saved):
    model = build_meta(tiny_config("qwen3"), dtype=torch.float32)
    blueprint = build_meta(tiny_config("qwen3"), dtype=torch.float32)
    materialize(model, CPU)
    read = read_own_weights(model, str(saved), blueprint=blueprint, strict=True)
    assert read.num_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert read.absent == set(dict(blueprint.named_buffers()))  # no file holds them
