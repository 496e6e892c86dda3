"""Exports lie in the files that an index names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omnilit.checkpoint.hf import export
from omnilit.checkpoint.shard_files import ShardFiles, find_shard_files
from omnilit.errors import ConfigError
from omnilit.models.build import build_meta
from omnilit.models.weights import gather_weights
from omnilit.modules import SFTModule
from tests.helpers.models import tiny, tiny_config

FAMILIES = ("qwen3", "qwen3_tied", "qwen3_moe", "gpt_oss", "deepseek_v3")
INDEX = "model.safetensors.index.json"


def blueprint(family):
    return lambda: build_meta(tiny_config(family), dtype=torch.float32)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_named", [True, False])
def test_an_export_has_the_files_of_the_model_that_training_started_from(
    family, is_named, tmp_path
):
    tiny(family).save_pretrained(tmp_path / "from", max_shard_size="100KB")
    index, model = str(tmp_path / "from" / INDEX), str(tmp_path / "from")
    places = (index, None) if is_named else (None, model)
    shards = find_shard_files(*places, blueprint(family))
    export(
        tiny_config(family),
        gather_weights(tiny(family)),
        None,
        tmp_path / "to",
        dtype=torch.float32,
        shards=shards,
    )
    assert len(content(tmp_path / "from")) > 3
    assert content(tmp_path / "to") == content(tmp_path / "from")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype="auto")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in tiny(family).state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_index_an_export_is_what_save_pretrained_writes(family, tmp_path):
    tiny(family).save_pretrained(tmp_path / "from")
    assert find_shard_files(None, str(tmp_path / "from"), blueprint(family)) is None
    tensors = gather_weights(tiny(family))
    export(tiny_config(family), tensors, None, tmp_path / "to", dtype=torch.float32)
    assert content(tmp_path / "to") == content(tmp_path / "from")


def write_index(folder, files):
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return str(folder / INDEX)


def load_names(family):
    model = tiny(family)
    return [name for name in model.state_dict() if name in gather_weights(model)]


def test_an_index_may_name_more_than_the_model_saves(tmp_path):
    files = dict.fromkeys(load_names("qwen3_tied"), "model-00001-of-00002.safetensors")
    files |= {"lm_head.weight": "model-00002-of-00002.safetensors", "mtp.weight": "x.safetensors"}
    index = write_index(tmp_path, files)
    shards = find_shard_files(index, None, blueprint("qwen3_tied"))
    tensors = gather_weights(tiny("qwen3_tied"))
    export(
        tiny_config("qwen3_tied"),
        tensors,
        None,
        tmp_path / "to",
        dtype=torch.float32,
        shards=shards,
    )
    (only,) = (tmp_path / "to").glob("*.safetensors")
    assert load_file(only).keys() == tensors.keys()
    assert set(json.loads((tmp_path / "to" / INDEX).read_text())["weight_map"]) == tensors.keys()


def test_tensors_without_a_file_are_refused_where_the_index_was_named(tmp_path, caplog):
    files = dict.fromkeys(load_names("qwen3")[1:], "model.safetensors")
    index = write_index(tmp_path, files)
    with pytest.raises(ConfigError, match=r"has no file for model\.embed_tokens\.weight"):
        find_shard_files(index, None, blueprint("qwen3"))
    assert find_shard_files(None, str(tmp_path), blueprint("qwen3")) is None
    assert "exports get files of another layout" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no weight_map in it"),
        ("[", "cannot be read"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"names the file '\.\./b\.safetensors'"),
        ('{"weight_map": {"a": "b.bin"}}', r"names the file 'b\.bin'"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ConfigError, match=f"safetensor_idx_path: .*{message}"):
        find_shard_files(str(tmp_path / INDEX), None, blueprint("qwen3"))
    with pytest.raises(ConfigError, match="No such file"):
        find_shard_files(str(tmp_path / "other.json"), None, blueprint("qwen3"))


def test_a_run_takes_the_index_that_is_named_before_that_of_its_weights(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path / "from", max_shard_size="100KB")
    index = write_index(tmp_path, dict.fromkeys(load_names("qwen3"), "all.safetensors"))
    path = str(tmp_path / "from")
    own = SFTModule(model_path=path).shard_files
    named = SFTModule(model_path=path, safetensor_idx_path=index).shard_files
    assert isinstance(own, ShardFiles)
    assert isinstance(named, ShardFiles)
    assert own.path == tmp_path / "from" / INDEX
    assert set(named.files.values()) == {"all.safetensors"}
