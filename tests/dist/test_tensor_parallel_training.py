"""Whole runs whose matrices are split, and one that goes on from their checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 4


def run(folder: Path, out: str, over: dict[str, Any], step: int | None) -> dict[str, Any]:
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": STEPS, **over}
    name = f"{out}_again" if step else out
    log, module = training.train(
        folder,
        training.arguments(folder / name, checkpoint={"save_steps": 2}, **settings),
        data={"eval_path": str(folder / "eval.jsonl")},
        load_path=folder / out / "checkpoints" / f"global_step_{step}" if step else None,
    )
    return {
        "numbers": training.numbers(log),
        "losses": [result.losses for result in log.results],
        "first": log.first_weights,
        "last": training.weights_of(module),
        "eval": module.eval_result,
    }


def is_like(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(
        found["numbers"], expected["numbers"][-len(found["numbers"]) :], strict=True
    ):
        assert (mine[0], mine[3]) == (theirs[0], theirs[3])
        assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
    for mine, theirs in zip(
        found["losses"], expected["losses"][-len(found["losses"]) :], strict=True
    ):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)


def test_a_run_over_split_matrices_equals_one_process_and_is_resumed_by_one(tmp_path):
    # with the router's balance loss, tied embeddings and blocks that are recomputed
    over = {"output_router_logits": True, "tie_word_embeddings": True}
    training.write_model(tmp_path / "model", "qwen3_moe", **over)
    training.write_conversations(tmp_path / "train.jsonl", 40)
    training.write_conversations(tmp_path / "eval.jsonl", 9, seed=1)
    work = {"tmp_path": tmp_path, "timeout_s": 150}
    (alone,) = run_ranks(run, 1, tmp_path, "alone", {}, None, **work)
    split = {"accelerator": {"tp_size": 2}, "recompute": True, "init_device": "cpu"}
    found = run_ranks(run, 2, tmp_path, "split", split, None, **work)
    assert training.is_bit_equal(found[0]["first"], alone["first"])
    for rank in found:
        assert len(rank["numbers"]) == STEPS
        is_like(rank, alone)
    (resumed,) = run_ranks(run, 1, tmp_path, "split", {}, 2, **work)
    assert [row[0] for row in resumed["numbers"]] == [3, 4]
    is_like(resumed, alone)
