"""Deterministic runs are equal to the bit, and leave everything as they found it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from omnilit.modules import SFTModule
from omnilit.parallel.determinism import ENVIRONMENT, HASH_SEED
from omnilit.strategies.omni import NO_HASH_SEED
from omnilit.testing import run_ranks
from omnilit.types import LossTerm, MicroBatch
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    over = {"attention_dropout": 0.1, "output_router_logits": True}
    training.write_model(folder / "model", "qwen3_moe", **over)
    training.write_conversations(folder / "train.jsonl", 40)
    return folder


def settings_now() -> tuple[Any, ...]:
    """What a deterministic run changes."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        *(os.environ.get(name) for name in ENVIRONMENT),
    )


class During(training.StepLog):
    """The settings in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: tuple[Any, ...] = ()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.settings = settings_now()


class Scattering(SFTModule):
    """Uses an operation that gives other bits now and then."""

    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        places, values = torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
        torch.zeros(2).put_(places, values)
        return super().loss_terms(batch)


def run(folder: Path, is_on: bool) -> dict[str, Any]:
    os.environ.pop(HASH_SEED, None)
    warnings: list[str] = []
    logger = logging.getLogger("omnilit.strategies.omni")
    logger.addFilter(lambda record: bool(warnings.append(record.getMessage())) or True)
    during, before = During(), settings_now()
    settings = training.arguments(
        folder / "run",
        max_steps=4,
        global_batch_size=4,
        recompute=True,
        enable_full_determinism=is_on,
    )
    log, module = training.train(folder, settings, callbacks=(during,))
    after = settings_now()
    error = ""
    try:
        training.train(folder, settings, module_class=Scattering)
    except RuntimeError as caught:
        error = str(caught)
    return {
        "numbers": training.numbers(log),
        "weights": training.weights_of(module),
        "settings": (before, during.settings, after, settings_now()),
        "error": error,
        "warnings": warnings,
    }


def test_two_runs_on_two_ranks_are_equal_to_the_bit(folder, tmp_path):
    first, second = (
        run_ranks(run, 2, folder, True, tmp_path=tmp_path, timeout_s=150) for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert one["numbers"] == two["numbers"]
    assert first[0]["weights"]
    assert training.is_bit_equal(first[0]["weights"], second[0]["weights"])
    for rank in first:
        before, during, after, after_error = rank["settings"]
        assert during == (True, True, False, *ENVIRONMENT.values())
        assert before == after == after_error == (False, False, False, *([None] * 4))
        assert "does not have a deterministic implementation" in rank["error"]
        assert rank["warnings"] == [NO_HASH_SEED] * 2  # once a run, in Python


def test_a_run_that_is_not_deterministic_takes_any_operation(folder, tmp_path):
    (rank,) = run_ranks(run, 1, folder, False, tmp_path=tmp_path, timeout_s=150)
    before, during, *_ = rank["settings"]
    assert during == before
    assert (rank["error"], rank["warnings"]) == ("", [])
