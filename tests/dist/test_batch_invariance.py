"""Batch-invariant mode while a run trains, and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from omnilit.errors import ConfigError
from omnilit.modules import SFTModule
from omnilit.testing import run_ranks
from omnilit.types import LossTerm, MicroBatch
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model", "qwen3_moe")
    training.write_conversations(folder / "train.jsonl", 20)
    return folder


def by_packing() -> bool:
    """Whether a product's first row has other bits beside 69 rows than alone."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 512, generator=generator) for n in (70, 256))
    return not torch.equal((x @ weight.t())[:1], x[:1] @ weight.t())


class Watching(SFTModule):
    seen: ClassVar[list[bool]] = []

    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        self.seen.append(by_packing())
        return super().loss_terms(batch)


class Failing(Watching):
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        super().loss_terms(batch)
        raise ValueError("no")


def run(folder: Path, is_on: bool, fails: bool = False) -> dict[str, Any]:
    settings = training.arguments(folder / "run", max_steps=3, enable_batch_invariant_mode=is_on)
    steps, error, before = [], "", by_packing()
    try:
        log, _ = training.train(folder, settings, module_class=Failing if fails else Watching)
        steps = training.numbers(log)
    except ValueError as caught:
        error = str(caught)
    return {
        "steps": steps,
        "error": error,
        "by_packing": (before, set(Watching.seen), by_packing()),
    }


def test_rows_depend_on_nothing_else_while_a_run_lasts_and_it_trains_the_same(folder, tmp_path):
    found, plain = (
        run_ranks(run, 1, folder, is_on, tmp_path=tmp_path, timeout_s=150)[0]
        for is_on in (True, False)
    )
    assert found["by_packing"] == (True, {False}, True)
    assert plain["by_packing"] == (True, {True}, True)
    assert len(found["steps"]) == 3
    for one, other in zip(found["steps"], plain["steps"], strict=True):
        assert one[1:3] == pytest.approx(other[1:3], rel=1e-4)


def test_torchs_operators_are_back_after_an_error(folder, tmp_path):
    (found,) = run_ranks(run, 1, folder, True, True, tmp_path=tmp_path, timeout_s=150)
    assert found["error"] == "no"
    assert found["by_packing"] == (True, {False}, True)


def refuse(folder: Path) -> str:
    settings = training.arguments(
        folder / "run", max_steps=3, enable_batch_invariant_mode=True, enable_compile=True
    )
    with pytest.raises(ConfigError) as error:
        training.train(folder, settings)
    return str(error.value)


def test_compiled_blocks_are_refused_in_python_too(folder, tmp_path):
    (message,) = run_ranks(refuse, 1, folder, tmp_path=tmp_path, timeout_s=150)
    assert message.startswith(
        "train.enable_batch_invariant_mode: true is not possible with enable_compile"
    )
