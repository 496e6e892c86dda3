"""Whole runs in the stages of a pipeline: steps, evaluation and files of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnilit.callbacks.layer_norms import LayerGradNorms
from omnilit.data.collate import CollateSettings, collate
from omnilit.errors import ConfigError, OmniError
from omnilit.testing import run_ranks
from omnilit.types import MicroBatch, Sample
from tests.helpers import training
from tests.helpers.layouts import DDP
from tests.helpers.models import tiny
from tests.helpers.tasks import STEPS, check_run, run_task, run_tasks, write_task

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
PP: dict[str, Any] = {"pp_size": 2}
INTERLEAVED = PP | {"pp_schedule": "interleaved", "pp_stages_per_rank": 2}
SAVING = {"checkpoint": {"save_steps": 2, "save_hf_weights": True, "hf_save_steps": STEPS}}
CASES: dict[str, dict[str, Any]] = {
    "stages": {"accelerator": PP, **SAVING},
    "gpipe, recomputed": {"accelerator": PP | {"pp_schedule": "gpipe"}, "recompute": True},
    "interleaved": {"accelerator": INTERLEAVED, **SAVING},
    "compiled": {"accelerator": PP, "enable_compile": True},
    "whole copies": {"accelerator": PP, **DDP},
    "each reads its own": {"accelerator": PP, "broadcast_model_weights_from_rank0": False},
    "balanced": {"accelerator": INTERLEAVED, "model": "moe"},
}
BESIDE: dict[str, dict[str, Any]] = {
    "two data ranks": {"accelerator": PP},
    "split matrices": {"accelerator": PP | {"tp_size": 2}, **SAVING},
    "split sequences": {"accelerator": PP | {"cp_size": 2}},
    "balanced, experts spread": {"accelerator": PP | {"ep_size": 2}, "model": "moe", **SAVING},
    "half dense, experts spread": {"accelerator": PP | {"ep_size": 2}, "model": "half dense"},
}
DEEP = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    moe = {"family": "qwen3_moe", "output_router_logits": True, "num_hidden_layers": 4}
    # the first stage has none of the experts
    half_dense = {"family": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 2}
    write_task(folder, **{"model": DEEP, "moe": moe, "half dense": half_dense})
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    moe = {"model": "moe", **SAVING}
    cases = {"alone": SAVING, "balanced": moe, "half dense": {"model": "half dense"}}
    tmp_path = tmp_path_factory.mktemp("alone")
    (found,) = run_ranks(run_tasks, 1, folder, cases, tmp_path=tmp_path, timeout_s=150)
    return found


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("two")
    return run_ranks(run_tasks, 2, folder, CASES, tmp_path=tmp_path, timeout_s=150)


@pytest.fixture(scope="module")
def four(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("four")
    return run_ranks(run_tasks, 4, folder, BESIDE, tmp_path=tmp_path, timeout_s=150)


def like(name: str) -> str:
    """Which run of one process a case is held against."""
    kind, *_ = name.split(",")
    return kind if kind in ("balanced", "half dense") else "alone"


@pytest.mark.parametrize("name", CASES)
def test_two_stages_train_the_steps_of_one_process(name, alone, two):
    for rank in two:
        check_run(rank[name], alone[like(name)])


@pytest.mark.parametrize("name", BESIDE)
def test_beside_other_axes_they_train_the_steps_of_one_process(name, alone, four):
    for rank in four:
        check_run(rank[name], alone[like(name)])


@pytest.mark.parametrize("name", ["stages", "interleaved"])
def test_the_weights_of_all_stages_are_exported_once(name, alone, two, folder):
    exported, expected = (
        load_file(next((folder / run).rglob("model.safetensors"))) for run in (name, "alone")
    )
    assert exported.keys() == expected.keys()
    for key, tensor in exported.items():
        assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-5)


def resume(folder: Path, jobs: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {
        name: run_task(
            folder,
            f"{name} from {saved}",
            {**over, "resume": f"{saved}/checkpoints/global_step_2", "eval_steps": 0},
        )
        for name, (saved, over) in jobs.items()
    }


def check_resumed(found: dict[str, Any], expected: dict[str, Any]) -> None:
    (step,) = found["steps"]
    assert step.step == STEPS
    assert step.loss == pytest.approx(expected["steps"][-1].loss, rel=1e-5)
    assert step.grad_norm == pytest.approx(expected["steps"][-1].grad_norm, rel=1e-5)


def test_checkpoints_of_stages_go_on_at_any_other_layout(alone, two, four, folder, tmp_path):
    on_one = {
        "one": ("stages", {}),
        "one, interleaved": ("interleaved", {}),
        "one, split": ("split matrices", {}),
        "one, balanced": ("balanced, experts spread", {"model": "moe"}),
    }
    on_two = {
        "sharded": ("interleaved", {}),
        "stages": ("alone", {"accelerator": PP}),
        "fewer a rank": ("interleaved", {"accelerator": PP}),
        "other axis": ("split matrices", {"accelerator": PP}),
        "balanced": ("balanced, experts spread", {"model": "moe", "accelerator": INTERLEAVED}),
    }
    for size, jobs in ((1, on_one), (2, on_two)):
        ranks = run_ranks(resume, size, folder, jobs, tmp_path=tmp_path, timeout_s=120)
        for rank in ranks:
            for name in jobs:
                check_resumed(rank[name], alone["balanced" if "balanced" in name else "alone"])


def read_weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    """First weights of runs that read them, sent by the first rank or each rank its own."""
    found = []
    for is_sent in (True, False):
        log, _ = training.train(
            folder,
            training.arguments(
                folder / f"read {is_sent}",
                accelerator=INTERLEAVED,
                broadcast_model_weights_from_rank0=is_sent,
                max_steps=1,
            ),
            model={"model_path": str(folder / "stored")},
            data={"train_path": str(folder / "long.jsonl")},
        )
        found.append(log.first_weights)
    return found


def test_stored_weights_come_to_the_stage_that_owns_them(folder, tmp_path):
    stored = training.write_model(folder / "stored", **DEEP)
    vocab = len(training.build_tokenizer())
    model = tiny("qwen3", vocab_size=vocab, **DEEP)
    model.save_pretrained(stored)
    expected = dict(model.named_parameters())
    first, _ = run_ranks(read_weights, 2, folder, tmp_path=tmp_path)
    for weights in first:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def uneven(samples: list[Sample], settings: CollateSettings) -> MicroBatch:
    """Rows as long as their samples, whatever is asked for."""
    return collate(samples, replace(settings, pad_to=None, collator=None))


def train_uneven(folder: Path) -> str:
    collator = f"{__name__}:uneven"
    try:
        run_task(folder, "uneven", {"accelerator": PP}, {"collator": collator})
    except OmniError as error:
        return str(error)
    return "nothing"


def test_rows_of_several_lengths_are_refused(folder, tmp_path):
    for said in run_ranks(train_uneven, 2, folder, tmp_path=tmp_path):
        assert "a pipeline takes rows of one length" in said


def train_tied(folder: Path) -> str:
    try:
        run_task(folder, "tied", {"accelerator": PP, "model": "tied"})
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_what_cannot_be_cut_is_refused_on_every_rank(folder, tmp_path):
    training.write_model(folder / "tied", "qwen3_tied")
    for said in run_ranks(train_tied, 2, folder, tmp_path=tmp_path):
        assert said.startswith("train.accelerator.pp_size: head and embedding of qwen3 are one")


def log_norms(folder: Path, accelerator: dict[str, Any]) -> dict[str, float]:
    norms = LayerGradNorms(1)
    training.train(
        folder,
        training.arguments(
            folder / f"norms {sorted(accelerator)}", accelerator=accelerator, max_steps=1
        ),
        data={"train_path": str(folder / "long.jsonl")},
        callbacks=(norms,),
    )
    return norms.norms


def test_the_norms_of_all_layers_reach_every_rank(folder, tmp_path):
    (expected,) = run_ranks(log_norms, 1, folder, {}, tmp_path=tmp_path)
    assert len(expected) > DEEP["num_hidden_layers"]
    for found in run_ranks(log_norms, 2, folder, INTERLEAVED, tmp_path=tmp_path):
        assert found == pytest.approx(expected, rel=1e-5)
