"""What runs on images leave for plain transformers and peft: whole models, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from omnilit.checkpoint.layout import step_folder
from omnilit.config import LoraArguments
from omnilit.modules import VLMModule
from omnilit.testing import run_ranks
from omnilit.tools.export import run as export
from tests.helpers import media_runs, training
from tests.helpers.media_runs import Model, ask

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 3
MODELS: tuple[Model, ...] = ("qwen3_vl", "qwen2_5_vl")
# layers of the language model, of the vision tower's blocks, and of its mergers
TARGETS = ["q_proj", "v_proj", "down_proj", "qkv", "linear_fc1"]
LORA = LoraArguments(enable=True, rank=4, alpha=12.0, target_modules=TARGETS)
SAVING = {"save_steps": STEPS, "hf_save_steps": STEPS, "save_hf_weights": True}


def train(folder: Path, name: Model, out: str, **over: Any) -> dict[str, Any]:
    """A run on this rank of however many there are."""
    lora = over.pop("lora", LoraArguments())
    settings = {"global_batch_size": 2, "max_steps": STEPS, "checkpoint": SAVING, **over}
    log, module = training.train(
        folder,
        training.arguments(folder / out, **settings),
        module_class=VLMModule,
        model={"config_path": None, "model_path": str(folder / name), "lora": lora},
        data={"train_size": None},
    )
    trained = {name for name, p in module.assembled.model.named_parameters() if p.requires_grad}
    return {
        "numbers": training.numbers(log),
        "weights": training.weights_of(module),
        "trained": trained,
    }


def train_alone(folder: Path) -> dict[str, dict[str, Any]]:
    return {"lora": train(folder, "qwen3_vl", "lora alone", lora=LORA)}


def train_on_two(folder: Path) -> dict[str, dict[str, Any]]:
    split = {"accelerator": {"tp_size": 2}}
    return {
        **{name: train(folder, name, f"{name} run") for name in MODELS},
        "lora": train(folder, "qwen3_vl", "lora", lora=LORA),
        "lora, tp": train(folder, "qwen3_vl", "lora tp", lora=LORA, **split),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    for name in MODELS:
        media_runs.write_seeing_model(folder / name, name, has_weights=True)
    media_runs.write_questions(folder / "train.jsonl", 30)
    return folder


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    return run_ranks(train_on_two, 2, folder, tmp_path=place, timeout_s=170)[0]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("one")
    return run_ranks(train_alone, 1, folder, tmp_path=place, timeout_s=170)[0]


def logits(model: Any, assets: Path, colour: str = "red") -> Tensor:
    """What a model says to an image and a question, which plain transformers prepares."""
    processor: Any = AutoProcessor.from_pretrained(assets)
    messages = ask({"type": "image"}, {"type": "text", "text": "What is it?"})["messages"]
    text = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    image = Image.new("RGB", (112, 84), colour)
    given = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**given).logits


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_says_the_same_to_an_image_with_an_export_of_two_ranks(
    name, folder, two, record_property
):
    place = step_folder(folder / f"{name} run", STEPS) / "hf_ckpt"
    plain = AutoModelForImageTextToText.from_config(load(folder / name).config)
    lacking, _ = plain.load_state_dict(two[name]["weights"], strict=False)
    assert not lacking
    said, expected = logits(load(place), place), logits(plain, folder / name)
    record_property("largest difference", difference(said, expected))
    assert difference(said, expected) == 0
    assert difference(said, logits(load(folder / name), place)) > 1e-2  # it was trained
    assert difference(said, logits(load(place), place, "blue")) > 1e-3  # it sees


def test_adapters_of_towers_and_language_take_the_same_steps_on_two_ranks(alone, two):
    for name in ("lora", "lora, tp"):
        for mine, theirs in zip(two[name]["numbers"], alone["lora"]["numbers"], strict=True):
            assert (mine[0], mine[3]) == (theirs[0], theirs[3])
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
    trained = alone["lora"]["trained"]
    assert all("lora_" in name for name in trained)
    for target in TARGETS:
        assert any(f".{target}." in name for name in trained), target
    assert any("visual" in name for name in trained)


def test_peft_loads_adapters_of_a_model_that_sees_and_merging_says_the_same(
    folder, two, tmp_path, record_property
):
    base, place = folder / "qwen3_vl", step_folder(folder / "lora", STEPS) / "hf_ckpt"
    assert two["lora"]["weights"]
    words = [str(folder / "lora"), str(tmp_path / "merged"), "--assets", str(base), "--merge"]
    assert export(words) == 0
    plain = load(base)
    start = logits(plain, base)
    adapted = logits(PeftModel.from_pretrained(plain, place), base)
    assert difference(adapted, start) > 1e-2
    merged = load(tmp_path / "merged")
    words = [str(folder / "lora"), str(tmp_path / "again"), "--assets", str(base)]
    assert export(words) == 0
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in place.iterdir()}
    said = logits(merged, tmp_path / "merged")
    record_property("largest difference", difference(said, adapted))
    assert difference(said, adapted) < 1e-5 * float(start.abs().max())
