"""Every data-parallel layout trains the steps of one process; prints how far each lies from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from omnilit.logging import format_table
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.layouts import ALONE, DDP_2, FSDP, HSDP, OTHERS, deviation, run_layout

STEPS = 10
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    training.write_model(folder / "dense")
    training.write_model(folder / "experts", "qwen3_moe", output_router_logits=True)
    training.write_conversations(folder / "train.jsonl", 200)
    return folder


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_every_layout_trains_the_steps_of_one_process(model, folder, tmp_path, capsys):
    found = {}
    for layout in (ALONE, FSDP, DDP_2, HSDP, *OTHERS):
        out = f"{model} {layout.name}"
        over = {"max_steps": STEPS, **layout.over}
        ranks = run_ranks(
            run_layout,
            layout.num_ranks,
            folder,
            out,
            model,
            over,
            tmp_path=tmp_path,
            timeout_s=300,
        )
        assert len({tuple(rank["numbers"]) for rank in ranks}) == 1, "ranks tell one story"
        found[layout.name] = ranks[0]
    expected = found.pop(ALONE.name)
    assert len(expected["numbers"]) == STEPS
    far = {name: deviation(numbers, expected) for name, numbers in found.items()}
    rows = [
        (name, *(f"{number:.1e}" for number in (d.loss, d.bias, d.grad_norm, d.gradient)))
        for name, d in far.items()
    ]
    header = ("layout", "loss, worst", "loss, mean", "gradient norm, worst", "first gradients")
    with capsys.disabled():
        title = f"{model}: {STEPS} steps, from one process"
        sys.stdout.write(f"\n{format_table(title, header, rows)}\n")
    for name, d in far.items():
        assert max(d.loss, d.grad_norm) < 1e-5, name
        assert d.gradient < 1e-4, name
        assert training.is_bit_equal(found[name]["first"], expected["first"]), name
