"""The recipes of digits and notes in a short form: random weights come to see and to hear."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from omnilit.modules import VLMModule
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.examples import load_example

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]
DIGITS = (0, 1, 4)
NOTES = {"C": 261.63, "A": 440.0}
FILMS, TONES = 180, 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of a few digits, films of them and two notes, with the recipes' own models."""
    folder = tmp_path_factory.mktemp("digits")
    example = load_example("digits")
    example.NOTES = NOTES
    pairs = zip(*example.load_images(), strict=True)
    kept = [(image, label) for image, label in pairs if label in DIGITS]
    images, labels = map(list, zip(*kept, strict=True))
    example.write_images(folder, images, labels)
    example.write_videos(folder, images, labels, FILMS)
    example.write_sounds(folder, TONES)
    example.write_model(folder / "model")
    example.write_omni_model(folder / "omni")
    return folder


def run(folder: Path, recipe: dict[str, Any], epochs: int) -> dict[str, Any]:
    data, model = recipe["data"], Path(recipe["model"]["init_args"]["config_path"]).name
    paths = {
        field: ",".join(str(folder / Path(name).name) for name in data[field].split(","))
        for field in ("train_path", "eval_path")
    }
    _, module = training.train(
        folder,
        training.arguments(
            folder / f"run_{model}",
            micro_batch_size=1,
            vit_lr=recipe["train"]["vit_lr"],
            optimizer=recipe["train"]["optimizer"],
            num_train_epochs=epochs,
            eval_epochs=epochs,
            eval_samples=recipe["train"]["eval_samples"],
            eval_samples_max_tokens=recipe["train"]["eval_samples_max_tokens"],
        ),
        module_class=VLMModule,
        model={"config_path": str(folder / model)},
        data={
            **paths,
            "max_seq_len": data["max_seq_len"],
            "mm_configs": data.get("mm_configs", {}),
            "train_size": None,
        },
    )
    return module.eval_result or {}


@pytest.mark.parametrize(("name", "epochs"), [("digits", 5), ("omni", 6)])
def test_what_no_step_has_seen_or_heard_is_named(folder, tmp_path, name, epochs):
    recipe = yaml.safe_load((ROOT / "configs" / "vlm" / f"{name}.yaml").read_text())
    (found,) = run_ranks(run, 1, folder, recipe, epochs, tmp_path=tmp_path, timeout_s=170)
    if name == "digits":
        # the end of the answer is the other token of two, so this is no less than the digit's loss
        assert 2 * found["eval_loss"] < 0.3 * math.log(len(DIGITS))
    model = Path(recipe["model"]["init_args"]["config_path"]).name
    file = folder / f"run_{model}" / "eval_samples.jsonl"
    answers: dict[str, list[bool]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        kind = row["media"][0]["caption"].partition(",")[0]
        answers.setdefault(kind, []).append(f"{row['completion']}<|im_end|>" == row["expected"])
    shares = {kind: sum(right) / len(right) for kind, right in answers.items()}
    assert set(shares) == ({"image", "video", "sound"} if name == "omni" else {"image"})
    assert min(shares.values()) > 0.8, shares
