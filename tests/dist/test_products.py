"""Products of bfloat16 matrices while a run trains, and after it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilit.config import MixedPrecisionConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.products import FLOAT32_PRODUCTS
from omnilit.modules import SFTModule
from omnilit.strategies import omni
from omnilit.testing import run_ranks
from omnilit.types import LossTerm, MicroBatch
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
BFLOAT16 = MixedPrecisionConfig(param_dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model", "qwen2")  # has layers with a bias and without
    training.write_conversations(folder / "train.jsonl", 20)
    return folder


class Failing(SFTModule):
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        raise ValueError("no")


def run(
    folder: Path, features: set[str], mixed: MixedPrecisionConfig, fails: bool = False
) -> dict[str, Any]:
    """Train on a CPU with these instructions for bfloat16."""
    calls, said = set(), []

    def note(name):
        def run(*args, **kwargs):
            calls.add(name)
            return FLOAT32_PRODUCTS[name](*args, **kwargs)

        return run

    logger = logging.getLogger("omnilit.strategies.omni")
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: bool(said.append(record.getMessage())) or True)
    error, steps = "", []
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(cpu_features=frozenset(features))
        patch.setattr(Machine, "detect", lambda device: machine)
        patch.setattr(omni, "FLOAT32_PRODUCTS", {name: note(name) for name in FLOAT32_PRODUCTS})
        settings = training.arguments(folder / "run", mixed=mixed, max_steps=3)
        try:
            log, _ = training.train(folder, settings, module_class=Failing if fails else SFTModule)
            steps = training.numbers(log)
        except ValueError as caught:
            error = str(caught)
    during, _ = set(calls), calls.clear()
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    return {
        "steps": steps,
        "during": during,
        "after": calls,
        "said": omni.WIDE_PRODUCTS in said,
        "error": error,
    }


def test_a_cpu_without_fast_bfloat16_trains_as_one_that_has_it(folder, tmp_path):
    fast, slow = (
        run_ranks(run, 1, folder, features, BFLOAT16, tmp_path=tmp_path, timeout_s=150)[0]
        for features in ({"amx_bf16"}, set())
    )
    assert (fast["during"], fast["said"]) == (set(), False)
    assert slow["during"] >= {"mm", "addmm"}
    assert slow["said"]
    assert len(slow["steps"]) == 3
    for one, other in zip(fast["steps"], slow["steps"], strict=True):
        assert one[1:3] == pytest.approx(other[1:3], rel=1e-2)
    assert not slow["after"]


@pytest.mark.parametrize(
    "mixed", [MixedPrecisionConfig(enable=False), MixedPrecisionConfig(param_dtype="auto")]
)
def test_runs_that_compute_in_float32_keep_torchs_products(folder, tmp_path, mixed):
    (rank,) = run_ranks(run, 1, folder, set(), mixed, tmp_path=tmp_path, timeout_s=150)
    assert len(rank["steps"]) == 3
    assert not rank["during"]


def test_torchs_products_are_back_after_an_error(folder, tmp_path):
    (rank,) = run_ranks(run, 1, folder, set(), BFLOAT16, True, tmp_path=tmp_path, timeout_s=150)
    assert (rank["error"], rank["said"]) == ("no", True)
    assert not rank["after"]
