"""The guide's examples in whole runs: all of them at once, as its files say."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from omnilit.cli.main import run
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.guide import DOCS, write_guide

pytestmark = pytest.mark.dist
METRICS = DOCS / "metrics.md"
OVERRIDES = [
    "--model.init_args.model_path", "null", "--model.init_args.config_path", "model",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def documented_keys() -> dict[str, str]:
    """The keys of the page on metrics, each with when it is there."""
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (\w[^|]*) \|$", METRICS.read_text(), re.MULTILINE)
    return dict(rows)


def run_guide(folder: Path, *files: str) -> list[dict[str, float]]:
    """`omnilit fit` in this process with files of the guide over a small configuration."""
    os.chdir(folder)
    os.environ["OMNILIT_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(folder))
    words = [word for file in ("base.yaml", *files) for word in ("--config", file)]
    assert run("fit", [*words, *OVERRIDES]) == 0
    out = yaml.safe_load(Path("base.yaml").read_text())["train"]["checkpoint"]["output_dir"]
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def train_plainly(folder: Path) -> list[dict[str, float]]:
    """The guide's last example."""
    os.chdir(folder)
    os.environ["OMNILIT_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(folder))
    from importlib import import_module

    import_module("my_package.plain").train("model", "train.jsonl", "out")
    return [json.loads(line) for line in Path("out", "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The guide's files, a tiny model, conversations and dialogues."""
    write_guide(tmp_path)
    training.write_model(tmp_path / "model")
    training.write_conversations(tmp_path / "train.jsonl", 30)
    lines = [{"lines": ["the quick", "brown fox"] * (1 + n % 3)} for n in range(20)]
    (tmp_path / "dialogues.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    return tmp_path


def write_base(folder: Path, **data: object) -> None:
    tree = {
        "model": {"config_path": "model", "tokenizer_path": "model"},
        "data": {
            "train_path": "train.jsonl",
            "max_seq_len": 64,
            "dataloader": {"num_workers": 0},
            **data,
        },
        "train": {
            "max_steps": 3,
            "optimizer": {"lr": 1e-3},
            "gradient_checkpointing": {"enable": False},
            "accelerator": {"fsdp_config": {"mixed_precision": {"enable": False}}},
            "checkpoint": {"output_dir": "run", "save_epochs": 0, "save_hf_weights": False},
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))


def test_task_kernel_template_collator_callbacks_and_logger_train_together(folder):
    write_base(folder, eval_path="train.jsonl", source_name="mine")
    files = ("task.yaml", "kernel.yaml", "template.yaml", "collator.yaml", "callbacks.yaml")
    (lines,) = run_ranks(run_guide, 1, folder, *files, tmp_path=folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    check_documented(lines)
    (csv,) = (folder / "output" / "csv").rglob("metrics.csv")
    header, *rows = csv.read_text().splitlines()
    assert {"loss", "lr-AdamW/backbone"} <= set(header.split(","))
    assert len(rows) >= 3
    kept = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert kept["imports"] == ["my_package.register"]


def check_documented(lines: list[dict[str, float]]) -> None:
    """What is written is on the page of metrics, and what the page promises is written."""
    documented = {re.sub(r"<\w+>", ".+", key): when for key, when in documented_keys().items()}
    always = [pattern for pattern, when in documented.items() if when == "always"]
    for line in lines:
        assert not [key for key in line if not any(re.fullmatch(p, key) for p in documented)]
        assert not [p for p in always if not any(re.fullmatch(p, key) for key in line)]
    assert {"eval_loss", "source/mine/loss", "source/mine/tokens"} <= lines[-1].keys()


def test_transform_and_reader_train_by_their_names(folder):
    write_base(folder, train_path="dialogues.jsonl")
    (lines,) = run_ranks(run_guide, 1, folder, "names.yaml", tmp_path=folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["tokens"] < 64 for line in lines)


def test_a_reader_of_ones_own_trains(folder):
    write_base(folder)
    (lines,) = run_ranks(run_guide, 1, folder, "countdown.yaml", tmp_path=folder)
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_plain_python_trains_without_the_command_line(folder):
    (lines,) = run_ranks(train_plainly, 1, folder, tmp_path=folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert (folder / "out" / "checkpoints" / "global_step_2" / "COMPLETE").is_file()
