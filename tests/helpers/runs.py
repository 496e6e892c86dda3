"""Folders of runs as `fit` leaves them, without a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

SETTINGS = {
    "model": {"class_path": "SFTModule", "init_args": {"config_path": "model", "model_path": None}},
    "data": {"train_path": "nowhere.jsonl", "max_seq_len": 64},
    "train": {"seed": 42, "optimizer": {"lr": 0.001}},
}


def step_line(step: int, **over: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl` with every number that a run always has."""
    return {
        "step": step,
        "epoch": 0,
        "loss": 4.0 / step,
        "grad_norm": 1.0 + 1.0 / step,
        "lr": 1e-3 * step,
        "lr/backbone": 1e-3 * step,
        "tokens": 100,
        "tokens_per_second": 400.0,
        "step_time_s": 0.5,
        "data_wait_s": 0.01,
        "max_memory_gib": 1.5,
        "skipped_steps": 0,
        **({"eval_loss": 5.0 / step} if step % 5 == 0 else {}),
        **over,
    }


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Lines of JSON; the file's folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_run(
    folder: Path,
    num_steps: int = 20,
    *,
    lr: float = 1e-3,
    numbers: Mapping[str, Any] | None = None,
) -> Path:
    """A run of so many steps.

    Args:
        folder: Made.
        num_steps: Of its metrics.
        lr: In its configuration.
        numbers: What every line has beside, or instead of, what it always has.
    """
    lines = [step_line(step, **(numbers or {})) for step in range(1, num_steps + 1)]
    write_lines(folder / "metrics.jsonl", lines)
    settings = {**SETTINGS, "train": {"seed": 42, "optimizer": {"lr": lr}}}
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder
