"""The parts of the recipe that need no download: finding the file, writing model and data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnilit.cli.plan import read
from omnilit.cli.raw import read_command
from tests.helpers.examples import EXAMPLES, load_example
from tests.helpers.models import tiny
from tests.helpers.tokenizers import build_tokenizer

ROOT = Path(__file__).parents[3]
MODULES = ("bisect", "copy", "json", "math")


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield load_example("smollm2")
    sys.modules.pop("stdlib_docs", None)


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_no_symbol_of_the_evaluation_is_trained(recipe, tmp_path):
    numbers = recipe.write_data(tmp_path, MODULES)
    asked = {name: [r["messages"][1]["content"] for r in rows(tmp_path / f"{name}.jsonl")]
             for name in ("train", "eval")}  # fmt: skip
    assert numbers == {name: len(found) for name, found in asked.items()}
    assert min(numbers.values()) > 3
    symbols = {
        name: {word.rstrip("?.") for text in found for word in text.split()}
        for name, found in asked.items()
    }
    shared = symbols["train"] & symbols["eval"]
    assert not [word for word in shared if "." in word]
    assert recipe.write_data(tmp_path, MODULES, max_rows=2) == {"train": 2, "eval": 2}


def test_the_model_is_found_without_importing_the_package(recipe, tmp_path, monkeypatch):
    package = tmp_path / "made_up_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('a chat program')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make smollm2"):
        recipe.find_gguf("made_up_model")
    (package / "model.Q4_1.gguf").write_bytes(b"GGUF")
    assert recipe.find_gguf("made_up_model") == package / "model.Q4_1.gguf"


def test_what_is_written_is_an_ordinary_model(recipe, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.config.quantization_config = {"quant_method": "gguf"}
    recipe.write_model(model, build_tokenizer(), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_the_two_configurations_differ_in_what_is_trained():
    def given(name):
        reading = read(read_command(["--config", str(ROOT / "configs" / "text" / f"{name}.yaml")]))
        assert not reading.problems
        return reading.checked.values

    full, adapters = given("smollm2"), given("smollm2_lora")
    assert adapters["model"].pop("lora")["enable"] is True
    assert adapters["model"] == full["model"]
    assert adapters["data"] == full["data"]
    for values in (full, adapters):
        values["train"].pop("checkpoint")
        values["train"]["optimizer"].pop("lr")
    assert adapters["train"] == full["train"]
