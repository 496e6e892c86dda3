"""What `omnilit export` makes of a checkpoint, beside what the run itself exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from omnilit.checkpoint.layout import step_folder
from omnilit.checkpoint.offline import export_checkpoint
from omnilit.errors import CheckpointError, ConfigError
from omnilit.testing import run_ranks
from omnilit.tools.export import run
from tests.helpers import training
from tests.helpers.models import tiny

pytestmark = pytest.mark.dist


def write_experts(folder):
    """bf16 weights of a model with experts, its tokenizer and generation settings."""
    training.write_model(folder, "qwen3_moe")
    size = len(AutoTokenizer.from_pretrained(folder))
    tiny("qwen3_moe", vocab_size=size).bfloat16().save_pretrained(folder)
    GenerationConfig(do_sample=True, top_k=7).save_pretrained(folder)


def train_and_export(folder):
    place = Path(folder)
    checkpoint = {"save_steps": 2, "hf_save_steps": 2, "save_hf_weights": True, "keep_last": 1}
    arguments = training.arguments(
        place / "run", checkpoint={**checkpoint, "save_async": True}, max_steps=4
    )
    training.train(place, arguments, model={"model_path": str(place / "model")})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_experts(folder / "model")
    training.write_conversations(folder / "train.jsonl", 30)
    run_ranks(train_and_export, 2, str(folder), tmp_path=folder)
    return folder


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_run_in_the_background_keeps_its_last_checkpoint_and_all_exports(trained):
    first, last = step_folder(trained / "run", 2), step_folder(trained / "run", 4)
    assert sorted(path.name for path in first.iterdir()) == ["hf_ckpt"]
    assert {"COMPLETE", "hf_ckpt", "meta.pt", "tensors"} < {path.name for path in last.iterdir()}
    assert {path.name for path in first.parent.iterdir()} == {first.name, last.name}


def test_one_process_exports_what_two_ranks_exported_file_by_file(trained, tmp_path, capsys):
    words = [str(trained / "run"), str(tmp_path / "out"), "--assets", str(trained / "model")]
    assert run(words) == 0
    exported = content(step_folder(trained / "run", 4) / "hf_ckpt")
    assert content(tmp_path / "out") == exported
    assert exported.keys() > {"config.json", "generation_config.json", "tokenizer.json", "COMPLETE"}
    said = capsys.readouterr().err
    assert f"checkpoint: {step_folder(trained / 'run', 4)}" in said
    assert f"export: {tmp_path / 'out'} (bfloat16)" in said


def test_the_export_is_in_the_layout_and_the_type_that_were_asked_for(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    words = [str(step_folder(trained / "run", 4)), str(tmp_path / "out")]
    run([*words, "--assets", str(trained / "model"), "--dtype", "float32", "--overwrite"])
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.experts.7.gate_proj.weight" in file.keys()  # noqa: SIM118
        full = file.get_tensor("model.norm.weight")
    assert full.dtype == torch.float32
    assert not (tmp_path / "out" / "old").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    half = step_folder(trained / "run", 4) / "hf_ckpt"
    rounded = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert not torch.equal(full, full.bfloat16().float())


def test_a_checkpoint_of_another_model_is_refused_and_leaves_nothing(trained, tmp_path):
    other = training.write_model(tmp_path / "other", "qwen3")
    with pytest.raises(CheckpointError, match="the checkpoint is of another model: it lacks"):
        run([str(trained / "run"), str(tmp_path / "out"), "--assets", str(other)])
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_assets_without_a_tokenizer_are_refused_as_such(trained, tmp_path):
    (tmp_path / "model").mkdir()
    config = (trained / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"--assets: .*model holds no vocabulary of a tokenizer"):
        run([str(trained / "run"), str(tmp_path / "out"), "--assets", str(tmp_path / "model")])


def test_a_checkpoint_that_does_not_say_its_type_needs_one(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("omnilit.checkpoint.offline.read_meta", lambda _: {})
    folder = step_folder(trained / "run", 4)
    with pytest.raises(
        ConfigError, match=r"--dtype: .* does not say in which type its run exports"
    ):
        export_checkpoint(folder, tmp_path / "out", assets=trained / "model")
    export_checkpoint(folder, tmp_path / "out", assets=trained / "model", dtype="float16")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float16
