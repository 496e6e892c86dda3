"""Adapters trained on several ranks: the same steps as on one, and what their checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from omnilit.checkpoint.layout import step_folder
from omnilit.config import InferArguments, MixedPrecisionConfig
from omnilit.errors import CheckpointError, ConfigError
from omnilit.testing import run_ranks
from omnilit.tools.chat import open_chat
from omnilit.tools.export import run
from tests.helpers import lora_runs

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

QUICK = ["tensor", "spread"]
SAVING = {"save_steps": 2, "hf_save_steps": 4, "save_hf_weights": True}
CASES = {"dense": "fsdp2", "experts": "spread"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    lora_runs.write_inputs(folder)
    return folder


def test_layouts_train_the_steps_of_one_process(folder, tmp_path):
    lora_runs.check_layouts(folder, QUICK, tmp_path=tmp_path)


def save(folder: Path) -> dict[str, Any]:
    over = {"max_steps": 4, "checkpoint": SAVING}
    return {n: lora_runs.run_case(folder, c, is_split=True, **over) for n, c in CASES.items()}


def resume(folder: Path) -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        load = step_folder(folder / "runs" / case, 2)
        over = {"max_steps": 4, "load_path": load, "out": folder / "resumed" / case}
        over["adapter_path"] = str(folder / "gone")  # where a run started is not read again
        found[name] = lora_runs.run_case(folder, case, is_split=False, **over)
    mixed = MixedPrecisionConfig(param_dtype="bfloat16")
    over = {"mixed": mixed, "out": folder / "mixed"}
    found["mixed"] = lora_runs.run_case(folder, "fsdp2", is_split=False, **over)
    return found


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    saved, _ = run_ranks(save, 2, folder, tmp_path=place, timeout_s=120)
    (resumed,) = run_ranks(resume, 1, folder, tmp_path=place, timeout_s=120)
    return saved, resumed


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_from_adapters_alone_on_another_number_of_ranks(name, folder, trained):
    saved, resumed = (results[name] for results in trained)
    assert [step for step, *_ in resumed["numbers"]] == [3, 4]
    for mine, theirs in zip(resumed["numbers"], saved["numbers"][2:], strict=True):
        assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
    tensors = step_folder(folder / "runs" / CASES[name], 2) / "tensors"
    held = FileSystemReader(tensors).read_metadata().state_dict_metadata
    assert len(held) == 4 * len(saved["first"])  # values, two moments and a count of steps
    assert all("lora_" in name for name in held)  # weights of the model are not among them


def test_adapters_are_float32_beside_weights_in_bfloat16(trained):
    saved, resumed = trained
    kinds = set(resumed["mixed"]["trained"].values())
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    for mine, theirs in zip(resumed["mixed"]["numbers"], saved["dense"]["numbers"], strict=False):
        assert 0 < abs(mine[1] - theirs[1]) < 0.02 * theirs[1]


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_a_run_exports_and_merging_is_the_same_model(
    name, folder, trained, tmp_path
):
    run_folder = folder / "runs" / CASES[name]
    export = step_folder(run_folder, 4) / "hf_ckpt"
    base = folder / ("qwen3" if name == "dense" else "qwen3_moe")
    words = [str(run_folder), "OUT", "--assets", str(base)]
    assert run([*words[:1], str(tmp_path / "again"), *words[2:]]) == 0
    files = {path.name for path in export.iterdir()}
    assert files == {path.name for path in (tmp_path / "again").iterdir()}
    for file in files - {"COMPLETE"}:
        assert (export / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert run([*words[:1], str(tmp_path / "merged"), *words[2:], "--merge"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base)
    start = logits(plain)
    adapted = PeftModel.from_pretrained(plain, export)
    values = load_file(export / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in values.values()} == {torch.float32}
    assert (logits(adapted) - start).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    scale = start.abs().max()
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-5 * scale
    with (tmp_path / "said").open("w") as out:
        arguments = InferArguments(model_path=str(export), tokenizer_path=str(base))
        chat = open_chat(arguments, str(export), "cpu", out)
    assert (logits(chat.model) - logits(adapted)).abs().max() < 1e-5 * scale


def test_flags_of_adapters_and_their_model_are_checked(folder, trained, tmp_path):
    words = [str(folder / "runs" / "fsdp2"), str(tmp_path / "out")]
    words += ["--assets", str(folder / "qwen3")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--base: no weights can be loaded"):
        run([*words, "--merge", "--base", str(tmp_path / "empty")])
    with pytest.raises(CheckpointError, match="is of another model"):
        run([*words[:3], str(folder / "qwen3_moe")])
