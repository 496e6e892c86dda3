"""Preference optimisation: the same steps at any number of ranks, on every axis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from omnilit.config import DPOConfig, LoraArguments
from omnilit.errors import ConfigError
from omnilit.modules import DPOModule
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.pairs import write_weights_and_pairs

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
FLOAT32 = DPOConfig(refer_model_precision="float32", beta=0.5)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    training.write_model(folder / "model")
    training.write_model(folder / "moe", "qwen3_moe", output_router_logits=True)
    write_weights_and_pairs(folder)
    return folder


def run(
    folder: Path, name: str, over: dict[str, Any], config: DPOConfig = FLOAT32
) -> dict[str, Any]:
    """Train on this rank of however many there are."""
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": STEPS, **over}
    model, lora = settings.pop("model", "model"), settings.pop("lora", LoraArguments())
    log, module = training.train(
        folder,
        training.arguments(folder / name, **settings),
        module_class=DPOModule,
        model={
            "config_path": str(folder / model),
            "model_path": str(folder / "weights") if lora.enable else None,
            "dpo_config": config,
            "lora": lora,
        },
        data={"data_type": "dpo", "eval_path": str(folder / "eval.jsonl")},
    )
    assert isinstance(module, DPOModule)
    return {
        "steps": log.results,
        "eval": module.eval_result,
        "has_reference": module.reference is not None,
        "has_copy": module.reference not in (None, module.policy),
        "weights": training.weights_of(module),
    }


def run_all(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run(folder, name, over) for name, over in cases.items()}


LORA: dict[str, Any] = {"lora": LoraArguments(enable=True, rank=4)}
WHOLE = LoraArguments(enable=True, rank=4, modules_to_save=["lm_head"])
ONE: dict[str, dict[str, Any]] = {
    "alone": {},
    "moe": {"model": "moe"},
    "adapters": LORA,
    "adapters and head": {"lora": WHOLE},
}
TWO: dict[str, dict[str, Any]] = {
    "data": {},
    "ulysses": {"accelerator": {"ulysses_size": 2}},
    "context": {"accelerator": {"cp_size": 2}},
    "tensor": {"accelerator": {"tp_size": 2}},
    "pipeline": {"accelerator": {"pp_size": 2}},
    "recomputed": {"recompute": True},
    "adapters, data": LORA | {"recompute": True},
    "adapters, pipeline": LORA | {"accelerator": {"pp_size": 2}},
    "moe, experts spread": {"model": "moe", "accelerator": {"ep_size": 2}},
}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return run_ranks(run_all, 1, folder, ONE, tmp_path=tmp_path_factory.mktemp("1"), timeout_s=170)[
        0
    ]


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    return run_ranks(run_all, 2, folder, TWO, tmp_path=tmp_path_factory.mktemp("2"), timeout_s=170)


def test_the_first_step_compares_a_model_with_itself(alone):
    first = alone["alone"]["steps"][0]
    assert first.losses == {"dpo": pytest.approx(math.log(2), abs=1e-6)}
    assert first.shown["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert set(first.shown) == {
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        *(f"logps/{name}" for name in ("chosen", "rejected")),
    }
    last = alone["alone"]["steps"][-1]
    assert last.shown["rewards/margins"] > 0.01
    assert last.loss < first.loss
    assert {"eval_loss", "eval_rewards/accuracies"} <= alone["alone"]["eval"].keys()


def test_under_adapters_the_reference_is_the_frozen_model(alone):
    assert [alone[name]["has_copy"] for name in ONE] == [True, True, False, True]
    for name in ("adapters", "adapters and head"):
        first, *_, last = alone[name]["steps"]
        assert first.loss == pytest.approx(math.log(2), abs=1e-6)
        assert last.shown["rewards/margins"] > 0.01
        assert first.grad_norm > 0


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_the_steps_of_one(name, alone, two):
    expected = alone[name.split(",")[0] if "," in name else "alone"]
    for rank in two:
        assert len(rank[name]["steps"]) == STEPS
        for found, step in zip(rank[name]["steps"], expected["steps"], strict=True):
            assert found.losses == pytest.approx(step.losses, rel=1e-5)
            assert found.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
            assert found.shown == pytest.approx(step.shown, rel=1e-5, abs=1e-6)
            assert (found.tokens, found.num_tokens) == (step.tokens, step.num_tokens)
        assert rank[name]["eval"] == pytest.approx(expected["eval"], rel=1e-5, abs=1e-6)


def test_a_loss_without_a_reference_builds_none(folder, tmp_path):
    for config in (
        DPOConfig(reference_free=True, average_log_prob=True),
        DPOConfig(loss_type="simpo", beta=2.0),
        DPOConfig(loss_type="orpo"),
    ):
        (found,) = run_ranks(run, 1, folder, "free", {}, config, tmp_path=tmp_path, timeout_s=100)
        assert not found["has_reference"]
        assert found["steps"][-1].loss < found["steps"][0].loss


def fail_on_conversations(folder: Path) -> str:
    settings = training.arguments(folder / "none", max_steps=1)
    training.write_conversations(folder / "talk.jsonl", 5)
    try:
        training.train(
            folder,
            settings,
            module_class=DPOModule,
            data={"train_path": str(folder / "talk.jsonl")},
        )
    except ConfigError as error:
        return str(error)
    return ""


def test_data_without_pairs_is_refused(folder, tmp_path):
    (message,) = run_ranks(fail_on_conversations, 1, folder, tmp_path=tmp_path, timeout_s=100)
    assert "data.data_type: the data has no pairs of answers" in message
