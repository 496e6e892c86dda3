"""`validate` from a checkpoint: the numbers of the evaluation within `fit`, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnilit.config import DPOConfig
from omnilit.modules import DPOModule, SFTModule
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.pairs import write_pairs

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 2
TASKS: dict[str, dict[str, Any]] = {
    "sft": {"module_class": SFTModule, "model": {}, "data": {}},
    "dpo": {
        "module_class": DPOModule,
        "model": {"dpo_config": DPOConfig(refer_model_precision="float32")},
        "data": {"data_type": "dpo"},
    },
}
TIMED = "eval_samples_s"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    training.write_model(folder / "model")
    for name, number, seed in (("train", 30, 0), ("eval", 7, 1)):
        (folder / "sft").mkdir(exist_ok=True)
        (folder / "dpo").mkdir(exist_ok=True)
        training.write_conversations(folder / "sft" / f"{name}.jsonl", number, seed=seed)
        write_pairs(folder / "dpo" / f"{name}.jsonl", number)
    return folder


def run(folder: Path, task: str, over: dict[str, Any]) -> dict[str, float]:
    """The numbers of one evaluation, on this rank of however many there are."""
    over, own = dict(over), TASKS[task]
    is_validation = over.pop("is_validation", False)
    settings = {
        "global_batch_size": 4,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "eval_samples": 2,
        "eval_samples_max_tokens": 5,
        "checkpoint": {"save_steps": STEPS},
        **over,
    }
    out = folder / task / ("validated" if is_validation else "run")
    data = {name: str(folder / task / f"{name}.jsonl") for name in ("train", "eval")}
    _, module = training.train(
        folder,
        training.arguments(out, **settings),
        module_class=own["module_class"],
        model=own["model"],
        data={"train_path": data["train"], "eval_path": data["eval"], **own["data"]},
        load_path=folder / task / "run/checkpoints/global_step_2" if is_validation else None,
        is_validation=is_validation,
    )
    assert module.eval_result is not None
    return {name: value for name, value in module.eval_result.items() if name != TIMED}


def run_all(folder: Path, task: str, over: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [run(folder, task, one) for one in over]


@pytest.mark.parametrize("task", TASKS)
def test_validate_alone_finds_what_fit_found(task, folder, tmp_path):
    alone = {"is_validation": True}
    [(fitted, validated)] = run_ranks(
        run_all, 1, folder, task, [{}, alone], tmp_path=tmp_path, timeout_s=170
    )
    assert validated == pytest.approx(fitted, rel=1e-6)
    others = [alone, {**alone, "accelerator": {"ulysses_size": 2}}]
    ranks = run_ranks(run_all, 2, folder, task, others, tmp_path=tmp_path, timeout_s=170)
    for result in [one for rank in ranks for one in rank]:
        assert result == pytest.approx(fitted, rel=1e-5)
    said = [
        json.loads(line)
        for name in ("run", "validated")
        for line in (folder / task / name / "eval_samples.jsonl").read_text().splitlines()
    ]
    assert len({(one["step"], one["prompt"], one["completion"]) for one in said}) == 2
