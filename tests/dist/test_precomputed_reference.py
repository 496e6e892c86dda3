"""What a reference model says, computed before training: the steps of a run that asks each time."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from omnilit.config import DPOConfig, LoraArguments
from omnilit.modules import DPOModule
from omnilit.modules.assembly import AssembledModel, ModelRequest
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.pairs import write_weights_and_pairs

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 3
ASKED = DPOConfig(refer_model_precision="float32", beta=0.5)
STORED = replace(ASKED, precompute_reference=True)
LORA: dict[str, Any] = {"lora": LoraArguments(enable=True, rank=4)}


class Counting(DPOModule):
    """Remembers which models were built."""

    def _assemble(self, request: ModelRequest) -> AssembledModel:
        assembled = super()._assemble(request)
        vars(self).setdefault("built", []).append(weakref.ref(assembled.model))
        return assembled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    training.write_model(folder / "model")
    write_weights_and_pairs(folder)
    return folder


def run(folder: Path, name: str, over: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank of however many there are."""
    over = dict(over)
    if over.pop("is_new", True):
        forget(folder)
    config, lora = over.pop("config", STORED), over.pop("lora", LoraArguments())
    load_path = over.pop("load_path", None)
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": STEPS, **over}
    log, module = training.train(
        folder,
        training.arguments(folder / name, **settings),
        module_class=Counting,
        model={
            "config_path": str(folder / "model"),
            "model_path": str(folder / "weights"),
            "dpo_config": config,
            "lora": lora,
        },
        data={"data_type": "dpo", "eval_path": str(folder / "eval.jsonl")},
        load_path=None if load_path is None else folder / load_path,
    )
    assert isinstance(module, Counting)
    built = [one() is not None for one in vars(module)["built"]]
    return {
        "steps": log.results,
        "eval": module.eval_result,
        "built": built,  # and whether it is still there
        "flops": [result.flops for result in log.results],
    }


def forget(folder: Path) -> None:
    """Let no earlier run have computed anything."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "cache" / "reference", ignore_errors=True)
    dist.barrier()


def run_all(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run(folder, name, over) for name, over in cases.items()}


ONE: dict[str, dict[str, Any]] = {
    "asked": {"config": ASKED},
    "stored": {"max_steps": STEPS, "checkpoint": {"save_steps": 2}},
    "stored before": {"is_new": False},
    "resumed": {"is_new": False, "load_path": "stored/checkpoints/global_step_2"},
    "adapters asked": LORA | {"config": ASKED},
    "adapters": LORA,
}
TWO: dict[str, dict[str, Any]] = {
    "ulysses": {"accelerator": {"ulysses_size": 2}},
    "adapters, pipeline": LORA | {"accelerator": {"pp_size": 2}},
}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("1")
    return run_ranks(run_all, 1, folder, ONE, tmp_path=path, timeout_s=170)[0]


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    return run_ranks(run_all, 2, folder, TWO, tmp_path=tmp_path_factory.mktemp("2"), timeout_s=170)


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same steps and evaluation, to rounding."""
    pairs = list(zip(found["steps"], expected["steps"][-len(found["steps"]) :], strict=True))
    assert pairs
    for own, step in pairs:
        assert own.step == step.step
        assert own.losses == pytest.approx(step.losses, rel=1e-5)
        assert own.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
        assert own.shown == pytest.approx(step.shown, rel=1e-5, abs=1e-5)
    assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["stored", "stored before", "resumed"])
def test_a_run_takes_the_steps_of_one_that_asks_each_time(name, alone):
    check_equal(alone[name], alone["asked"])


def test_the_reference_is_gone_while_training_and_built_once_a_cache(alone):
    assert [len(alone[name]["built"]) for name in ONE] == [2, 2, 1, 1, 1, 1]
    assert [sum(alone[name]["built"]) for name in ONE] == [2, 1, 1, 1, 1, 1]
    asked, stored = (alone[name]["flops"][0] for name in ("asked", "stored"))
    assert stored == pytest.approx(0.75 * asked, rel=0.01)  # one forward of four passes less


def test_under_adapters_nothing_is_built_and_nothing_run_twice(alone):
    check_equal(alone["adapters"], alone["adapters asked"])
    assert alone["adapters"]["flops"][0] < 0.8 * alone["adapters asked"]["flops"][0]


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_compute_what_one_computes(name, alone, two):
    for rank in two:
        check_equal(rank[name], alone["adapters asked" if "adapters" in name else "asked"])
