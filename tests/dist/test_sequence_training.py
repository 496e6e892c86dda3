"""Whole runs whose sequences are split: the steps, the counts and the evaluation of one process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilit.data.quarantine import read_quarantine
from omnilit.errors import DataError
from omnilit.modules.loaders import CountReducer
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.testing import run_ranks
from omnilit.types import StepResult
from tests.helpers.bad_records import write_bad_records
from tests.helpers.layouts import DDP
from tests.helpers.tasks import check_run, check_step, run_task, run_tasks, write_task

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ULYSSES, CONTEXT = {"ulysses_size": 2}, {"cp_size": 2}
BAD = {"silent_exception": True, "max_bad_fraction": 0.9, "datasets_type": "iterable"}
CASES: dict[str, dict[str, Any]] = {
    "ulysses": {"accelerator": ULYSSES},
    "context": {"accelerator": CONTEXT, "recompute": True},
    "ulysses, whole copies": {"accelerator": ULYSSES, **DDP},
    "compiled": {"accelerator": ULYSSES, "enable_compile": True},
    "overlapped": {"accelerator": ULYSSES | {"enable_async": True}, "enable_compile": True},
    "ring": {"accelerator": CONTEXT | {"cp_method": "ring"}},
    "balanced": {"accelerator": ULYSSES, "model": "moe"},
    "padded": {"accelerator": ULYSSES | {"dp_shard_size": 1}, "pad_to_length": True},
}
BESIDE: dict[str, dict[str, Any]] = {
    "two copies": {"accelerator": ULYSSES | {"dp_replicate_size": 2}},
    "both and a ring": {"accelerator": {**ULYSSES, **CONTEXT, "cp_method": "ring"}},
    "split matrices": {"accelerator": ULYSSES | {"tp_size": 2}},
    "balanced, experts spread": {"accelerator": CONTEXT | {"ep_size": 2}, "model": "moe"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    moe = {"family": "qwen3_moe", "output_router_logits": True}
    write_task(folder, model={}, moe=moe)
    write_bad_records(folder / "bad.jsonl")
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("alone")
    cases = {"alone": {}, "padded": {"pad_to_length": True}, "balanced": {"model": "moe"}}
    (found,) = run_ranks(run_tasks, 1, folder, cases, tmp_path=tmp_path, timeout_s=150)
    return found


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("two")
    return run_ranks(run_tasks, 2, folder, CASES, tmp_path=tmp_path, timeout_s=150)


def like(name: str) -> str:
    """Which run of one process a case is held against."""
    return next((one for one in ("padded", "balanced") if name.startswith(one)), "alone")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_sequences_train_the_steps_of_one_process(name, alone, two):
    for rank in two:
        check_run(rank[name], alone[like(name)])


def test_copies_of_a_model_stay_the_same(two):
    one, other = (rank["ulysses, whole copies"]["held"] for rank in two)
    assert one == other
    assert one[0] != one[1]


def test_beside_other_axes_four_ranks_train_the_steps_of_one_process(folder, alone, tmp_path):
    ranks = run_ranks(run_tasks, 4, folder, BESIDE, tmp_path=tmp_path, timeout_s=150)
    for name in BESIDE:
        for rank in ranks:
            check_run(rank[name], alone[like(name)])


def reduce_with_error() -> str:
    topology = Topology.build(ParallelSizes(ulysses_size=2).resolve(2), torch.device("cpu"))
    error = DataError(problem="gone", fix="look") if topology.sequence_rank == 1 else None
    try:
        CountReducer(topology)({"tokens": 3.0}, error)
    except DataError as caught:
        return str(caught)
    return "nothing"


def test_an_error_of_one_rank_that_reads_the_data_stops_all(tmp_path):
    for said in run_ranks(reduce_with_error, 2, tmp_path=tmp_path):
        assert "gone" in said


def read_bad(folder: Path, name: str, accelerator: dict[str, Any]) -> list[StepResult]:
    over = {"accelerator": accelerator, "eval_steps": 0, "max_steps": 2, "global_batch_size": 1}
    data = {"train_path": str(folder / "bad.jsonl"), "eval_path": None, **BAD}
    return run_task(folder, name, over, data)["steps"]


def test_ranks_that_read_the_same_data_write_each_bad_record_once(folder, tmp_path):
    (expected,) = run_ranks(read_bad, 1, folder, "bad", {}, tmp_path=tmp_path)
    ranks = run_ranks(read_bad, 2, folder, "bad, split", ULYSSES, tmp_path=tmp_path)
    for rank in ranks:
        for mine, theirs in zip(rank, expected, strict=True):
            check_step(mine, theirs)
    files = [folder / name / "quarantine.jsonl" for name in ("bad", "bad, split")]
    once, found = (Counter(record.row for record in read_quarantine(file)) for file in files)
    assert once == found
    assert set(found.values()) == {1}
