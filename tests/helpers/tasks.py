"""One task of two data sources with an evaluation, on any layout, and how runs of it compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from omnilit.types import StepResult
from tests.helpers import training
from tests.helpers.gradients import compare
from tests.helpers.layouts import Watcher

STEPS = 3


def write_task(folder: Path, **models: dict[str, Any]) -> None:
    """Data, and by name the models.

    Args:
        folder: Where.
        models: Arguments of `training.write_model`.
    """
    for name, over in models.items():
        training.write_model(folder / name, **over)
    sources = [folder / f"{name}.jsonl" for name in ("long", "short")]
    for seed, source in enumerate(sources):
        training.write_conversations(source, 30, seed=seed)
    schedule = [{"schedule_type": "const", "weights": [0.5, 0.5]}]
    mixture = {"sources": list(map(str, sources)), "names": ["a", "b"], "schedule": schedule}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    training.write_conversations(folder / "eval.jsonl", 9, seed=5)


def run_task(
    folder: Path, name: str, over: dict[str, Any], data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train on this rank of however many there are.

    Args:
        folder: From `write_task`.
        name: Of the run.
        over: Fields of `train`, and the name of the `model`; see `training.arguments`.
        data: Further arguments of the data module.
    """
    torch.compiler.set_default_backend("eager")
    watcher = Watcher()
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": STEPS, **over}
    model = settings.pop("model", "model")
    resume = settings.pop("resume", None)
    _, module = training.train(
        folder,
        training.arguments(folder / name, **settings),
        model={"config_path": str(folder / model)},
        data={
            "train_path": str(folder / "mixture.yaml"),
            "eval_path": str(folder / "eval.jsonl"),
            **(data or {}),
        },
        callbacks=(watcher,),
        load_path=folder / resume if resume else None,
    )
    return {
        "steps": watcher.results,
        "gradients": watcher.gradients,
        "eval": module.eval_result,
        "held": watcher.held,
    }


def run_tasks(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`run_task` of several cases in the same processes."""
    return {name: run_task(folder, name, over) for name, over in cases.items()}


def check_step(found: StepResult, expected: StepResult) -> None:
    """Two runs took the same step."""
    for name in ("loss", "grad_norm", "flops"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for name in ("step", "tokens", "num_tokens", "source_tokens"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.source_losses == pytest.approx(expected.source_losses, rel=1e-5)


def check_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two runs are the same run."""
    assert len(found["steps"]) == STEPS
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        check_step(mine, theirs)
    compare(found["gradients"], expected["gradients"])
    assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)
