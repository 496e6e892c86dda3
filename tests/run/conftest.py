"""One task for every run of the command line, and how to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import training

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, conversations and a configuration that trains them in fp32."""
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 80)
    training.write_conversations(folder / "eval.jsonl", 9, seed=1)
    model = str(folder / "model")
    config = {
        "model": {"config_path": model, "tokenizer_path": model},
        "data": {
            "train_path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "eval.jsonl"),
            "max_seq_len": 64,
            "dataloader": {"num_workers": 0},
        },
        "train": {
            "global_batch_size": 2,
            "optimizer": {"lr": 1e-3, "lr_decay_style": "cosine"},
            "gradient_checkpointing": {"enable": False},
            "accelerator": {"fsdp_config": {"mixed_precision": {"enable": False}}},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def environment(task: Path) -> dict[str, str]:
    """The variables of a run: one thread, a cache of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMNILIT_CACHE": str(task / "cache")}


@pytest.fixture(scope="session")
def omnilit(environment: dict[str, str]) -> Run:
    """Run `omnilit` with these words in a process of its own."""

    def run(*words: object, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "omnilit", *map(str, words)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return run


def read_lines(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    text = (run_folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
