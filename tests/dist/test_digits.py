"""The recipe of handwritten digits in a short form: a model from random weights comes to see."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from omnilit.modules import VLMModule
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]
DIGITS = (0, 1, 4)
EPOCHS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of a few digits, in the recipe's own places, with its own model."""
    folder = tmp_path_factory.mktemp("digits")
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    pairs = zip(*example.load_images(), strict=True)
    kept = [(image, label) for image, label in pairs if label in DIGITS]
    example.write_images(folder, *map(list, zip(*kept, strict=True)))
    example.write_model(folder / "model")
    return folder


def run(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    _, module = training.train(
        folder,
        training.arguments(
            folder / "run",
            micro_batch_size=1,
            vit_lr=recipe["train"]["vit_lr"],
            optimizer=recipe["train"]["optimizer"],
            num_train_epochs=EPOCHS,
            eval_epochs=EPOCHS,
        ),
        module_class=VLMModule,
        data={
            "train_path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "eval.jsonl"),
            "max_seq_len": recipe["data"]["max_seq_len"],
            "train_size": None,
        },
    )
    return module.eval_result or {}


def test_digits_that_no_step_has_seen_are_told_apart(folder, tmp_path):
    recipe = yaml.safe_load((ROOT / "configs" / "vlm" / "digits.yaml").read_text())
    (found,) = run_ranks(run, 1, folder, recipe, tmp_path=tmp_path, timeout_s=170)
    # the end of the answer is the other token of two, so that this is no less than the digit's loss
    of_digit = 2 * found["eval_loss"]
    assert of_digit < 0.3 * math.log(len(DIGITS))
