"""The recipe of `configs/classification` in a short form, up to transformers' own pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from omnilit.tools import export
from tests.run.conftest import read_lines

pytestmark = [pytest.mark.cli, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "classification" / "stdlib_modules.yaml"
NAMES = yaml.safe_load(RECIPE.read_text())["model"]["label_names"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the recipe finds what it names."""
    folder = tmp_path_factory.mktemp("classes")
    example = [sys.executable, str(ROOT / "examples" / "stdlib_docs.py")]
    out = str(folder / "demo_output" / "data")
    subprocess.run([*example, "--out", out], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def words(folder) -> list[object]:
    """The recipe with short texts, in fp32, without a path of this folder's parent."""
    data, model = folder / "demo_output" / "data", folder / "demo_output" / "data" / "model"
    return [
        RECIPE, "--model.init_args.config_path", model, "--data.max_seq_len", 48,
        "--data.train_path", data / "classes" / "train.jsonl",
        "--data.eval_path", data / "classes" / "eval.jsonl",
        "--train.checkpoint.output_dir", folder / "run", "--train.num_train_epochs", 1,
        "--train.accelerator.fsdp_config.mixed_precision.enable", "false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(folder, words, omnilit) -> tuple[Path, str]:
    done = omnilit("fit", *words)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


def records(folder: Path) -> list[dict[str, str]]:
    text = (folder / "demo_output" / "data" / "classes" / "eval.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_one_pass_beats_the_majority(finished, folder):
    out, log = finished
    last = read_lines(out)[-1]
    labels = Counter(record["label"] for record in records(folder))
    number = sum(labels.values())
    assert last["eval_accuracy"] > max(labels.values()) / number + 0.1
    counts = last["eval_confusion"]
    assert [sum(row) for row in counts] == [labels[name] for name in NAMES]
    right = sum(row[index] for index, row in enumerate(counts))
    assert last["eval_accuracy"] == pytest.approx(right / number, abs=1e-6)
    assert 0 < last["eval_f1"] < 1
    assert "evaluation: classes (rows) and what they were taken for" in log
    assert list((out / "tensorboard").iterdir())
    assert "Traceback" not in log
    assert "Warning" not in log


def test_validate_alone_gives_the_last_evaluations_numbers(finished, words, omnilit):
    out, _ = finished
    done = omnilit("validate", *words, "--train.checkpoint.load_path", "auto")
    assert done.returncode == 0, done.stderr
    line, last = json.loads((out / "eval.jsonl").read_text()), read_lines(out)[-1]
    for name in ("eval_loss", "eval_accuracy", "eval_f1"):
        assert line[name] == pytest.approx(last[name], rel=1e-5)
    assert line["eval_confusion"] == last["eval_confusion"]


def test_the_export_classifies_in_the_pipeline_of_transformers(finished, folder):
    out, _ = finished
    (export_folder,) = (out / "checkpoints").glob("*/hf_ckpt")
    some = records(folder)[:24]
    tokenizer = AutoTokenizer.from_pretrained(export_folder)
    texts = [tokenizer.decode(tokenizer(r["text"])["input_ids"][:48]) for r in some]
    classify: Any = pipeline("text-classification", model=str(export_folder), device="cpu")
    found = classify(texts, batch_size=8, top_k=None)
    model = AutoModelForSequenceClassification.from_pretrained(export_folder)
    assert model.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad():
        for text, scores in zip(texts, found, strict=True):
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            own = dict(zip(NAMES, logits.softmax(-1).tolist(), strict=True))
            assert {one["label"]: one["score"] for one in scores} == pytest.approx(own, abs=1e-4)
    right = sum(s[0]["label"] == r["label"] for s, r in zip(found, some, strict=True))
    assert right > 0


def test_a_checkpoint_exports_the_same_classifier(finished, tmp_path):
    out, _ = finished
    assert export.run([str(out), str(tmp_path / "again")]) == 0
    (own,) = (out / "checkpoints").glob("*/hf_ckpt")
    made = tmp_path / "again"
    assert json.loads((made / "config.json").read_text()) == json.loads(
        (own / "config.json").read_text()
    )
    first, second = load_file(made / "model.safetensors"), load_file(own / "model.safetensors")
    assert first.keys() == second.keys()
    assert "score.weight" in first
    assert all(torch.equal(first[name], second[name]) for name in first)
