"""What watches a real run sees the same at any number of ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from omnilit.callbacks import chosen_callbacks
from omnilit.config import ProfileConfig
from omnilit.errors import CheckpointError
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 40)
    return folder


def run(folder: Path, out: str, profile: dict[str, Any]) -> list[dict[str, Any]]:
    """Three steps, the second one profiled, the norms of every block in every other one."""
    arguments = training.arguments(
        folder / out,
        global_batch_size=4,
        max_steps=3,
        gc_steps=1,
        log_layer_grad_norms_steps=2,
        profile=ProfileConfig(
            enable=True, start_step=2, end_step=3, trace_dir=str(folder / out / "trace"), **profile
        ),
    )
    training.train(folder, arguments, callbacks=tuple(chosen_callbacks(arguments)))
    text = (folder / out / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def names_in(trace: Path) -> set[str]:
    with gzip.open(trace, "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("alone")
    return run_ranks(run, 1, folder, "one", {}, tmp_path=tmp_path, timeout_s=150)[0]


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("together")
    over = {"rank0_only": False, "with_stack": False, "profile_memory": False}
    return run_ranks(run, 2, folder, "two", over, tmp_path=tmp_path, timeout_s=150)[0]


def test_a_trace_of_a_real_step_holds_our_own_operations(folder, alone):
    (trace,) = (folder / "one" / "trace").iterdir()
    assert trace.name == "rank0_steps_2_to_2.json.gz"
    names = names_in(trace)
    assert {"ProfilerStep#2", "aten::scaled_dot_product_attention", "[memory]"} <= names
    assert not {"ProfilerStep#1", "ProfilerStep#3"} & names
    for ours in ("kernels/attention.py", "models/head.py", "modules/base.py"):
        assert any(ours in name for name in names), ours


def test_every_rank_writes_its_own_trace_where_it_should(folder, together):
    traces = sorted((folder / "two" / "trace").iterdir())
    assert [trace.name for trace in traces] == [
        "rank0_steps_2_to_2.json.gz",
        "rank1_steps_2_to_2.json.gz",
    ]
    for trace in traces:
        names = names_in(trace)
        assert {"ProfilerStep#2", "aten::scaled_dot_product_attention"} <= names
        assert any("all_gather" in name or "allgather" in name for name in names)


def test_the_norms_of_the_blocks_make_up_the_whole_at_any_number_of_ranks(alone, together):
    for one, two in zip(alone, together, strict=True):
        norms = {key: value for key, value in one.items() if key.startswith("grad_norm/")}
        assert bool(norms) is (one["step"] == 2)
        if norms:
            layers = {"grad_norm/model.layers.0", "grad_norm/model.layers.1", "grad_norm/lm_head"}
            assert layers < norms.keys()
            assert sum(n**2 for n in norms.values()) == pytest.approx(one["grad_norm"] ** 2)
            assert {key: two[key] for key in norms} == pytest.approx(norms, rel=1e-5)


def test_a_step_is_the_same_work_at_any_number_of_ranks(alone, together):
    for one, two in zip(alone, together, strict=True):
        work = [line["tflops_per_second"] * line["step_time_s"] for line in (one, two)]
        assert work[0] > 0
        assert work[1] == pytest.approx(work[0])


def run_where_the_numbers_cannot_go(folder: Path) -> str:
    out = folder / "blocked"
    (out / "metrics.jsonl").mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError) as caught:
        training.train(folder, training.arguments(out, global_batch_size=4, max_steps=1))
    return str(caught.value)


def test_numbers_that_the_first_rank_cannot_write_end_all_ranks(folder, tmp_path):
    messages = run_ranks(run_where_the_numbers_cannot_go, 2, folder, tmp_path=tmp_path)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"opening {folder}/blocked/metrics.jsonl failed: Is a directory")
