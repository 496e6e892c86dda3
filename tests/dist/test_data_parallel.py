"""Copies, shards and copies of shards train the same steps, and each setting does what it says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnilit.config import GradientCheckpointingConfig, MixedPrecisionConfig
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.layouts import DDP, DDP_2, FSDP, HSDP, deviation, run_layout

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 3
BF16 = {"mixed": MixedPrecisionConfig()}
# What changes where tensors are and when, and no number
SAME: dict[str, dict[str, Any]] = {
    "kept gathered": {"fsdp": {"reshard_after_backward": False}},
    "not prefetched": {"fsdp": {"forward_prefetch": False}},
    "built on the CPU": {"init_device": "cpu"},
    "built on the CPU under DDP": {"init_device": "cpu", **DDP},
    "drawn by each rank": {"broadcast_model_weights_from_rank0": False},
    "reentrant": {"recompute": GradientCheckpointingConfig(enable_reentrant=True)},
    "reentrant under DDP": {"recompute": GradientCheckpointingConfig(enable_reentrant=True), **DDP},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 60)
    return folder


def run_all(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: run_layout(folder, name, "model", {"max_steps": STEPS, **over})
        for name, over in cases.items()
    }


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("alone")
    cases = {"fp32": {}, "bf16": BF16}
    return run_ranks(run_all, 1, folder, cases, tmp_path=tmp_path, timeout_s=150)[0]


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("two")
    cases = {
        FSDP.name: FSDP.over,
        DDP_2.name: DDP_2.over,
        "bf16": BF16,
        "bf16 under DDP": {**BF16, **DDP},
        "bf16 reduced": {
            "mixed": MixedPrecisionConfig(param_dtype="float32", reduce_dtype="bfloat16"),
            **DDP,
        },
        "bf16 out": {"mixed": MixedPrecisionConfig(output_dtype="bfloat16")},
        "uncast inputs": {"mixed": MixedPrecisionConfig(cast_forward_inputs=False)},
        **SAME,
    }
    return run_ranks(run_all, 2, folder, cases, tmp_path=tmp_path, timeout_s=150)


def check_like(found: dict[str, Any], expected: dict[str, Any]) -> None:
    far = deviation(found, expected)
    assert max(far.loss, far.grad_norm) < 1e-5
    assert far.gradient < 1e-4
    assert found["is_hf"]


@pytest.mark.parametrize("name", [FSDP.name, DDP_2.name])
def test_two_ranks_train_the_steps_of_one_process(name, two_ranks, alone):
    for rank in two_ranks:
        check_like(rank[name], alone["fp32"])
    assert training.is_bit_equal(two_ranks[0][name]["first"], alone["fp32"]["first"])


def test_two_copies_of_two_shards_train_the_steps_of_one_process(folder, alone, tmp_path):
    cases = {HSDP.name: HSDP.over}
    ranks = run_ranks(run_all, 4, folder, cases, tmp_path=tmp_path, timeout_s=150)
    for rank in ranks:
        check_like(rank[HSDP.name], alone["fp32"])
    assert training.is_bit_equal(ranks[0][HSDP.name]["first"], alone["fp32"]["first"])
    held = [tuple(rank[HSDP.name]["held"]) for rank in ranks]
    assert held[0] == held[2] != held[1] == held[3]  # ranks 0 and 1 share a copy, 2 and 3 another


def test_under_ddp_every_rank_holds_the_same_from_the_start_to_the_end(two_ranks):
    one, other = (rank[DDP_2.name]["held"] for rank in two_ranks)
    assert one == other
    assert one[0] != one[1], "training has moved the weights"


def test_ddp_computes_in_bf16_what_fsdp2_does_and_keeps_float32(two_ranks, alone):
    found = two_ranks[0]["bf16 under DDP"]
    for expected in (two_ranks[0]["bf16"], alone["bf16"]):
        check_like(found, expected)
    exact = alone["fp32"]["numbers"][0]
    assert 0 < abs(found["numbers"][0][1] / exact[1] - 1) < 0.01
    assert {tensor.dtype for tensor in found["last"].values()} == {torch.float32}


def test_ddp_sums_gradients_in_the_dtype_that_is_asked_for(two_ranks, alone):
    exact, rounded = alone["fp32"]["numbers"][0], two_ranks[0]["bf16 reduced"]["numbers"][0]
    assert rounded[1] == pytest.approx(exact[1], rel=1e-6)  # the forward is float32 there
    assert 1e-6 < abs(rounded[2] / exact[2] - 1) < 0.02


def test_the_output_dtype_rounds_the_losses_and_nothing_before_them(two_ranks):
    rounded, exact = (two_ranks[0][name]["numbers"][0] for name in ("bf16 out", "bf16"))
    assert 0 < abs(rounded[1] / exact[1] - 1) < 2**-8
    assert abs(rounded[2] / exact[2] - 1) < 0.02


def test_inputs_of_the_computing_dtype_need_no_cast(two_ranks):
    uncast, cast = (two_ranks[0][name] for name in ("uncast inputs", "bf16"))
    assert uncast["numbers"] == cast["numbers"]


@pytest.mark.parametrize("name", SAME)
def test_where_and_when_tensors_are_held_changes_no_bit(name, two_ranks):
    like = DDP_2.name if SAME[name].get("fsdp") == DDP["fsdp"] else FSDP.name
    found, expected = two_ranks[0][name], two_ranks[0][like]
    assert found["numbers"] == expected["numbers"]
    assert training.is_bit_equal(found["first"], expected["first"])
    assert training.is_bit_equal(found["last"], expected["last"])


def switch(folder: Path) -> dict[str, list[Any]]:
    """Runs that are saved in one mode and go on in the other, and what each exports."""
    modes = {"sharded": {}, "copied": DDP}
    numbers: dict[str, list[Any]] = {}
    for mode, over in modes.items():
        settings = {"max_steps": 4, "checkpoint": {"save_steps": 2}, **over}
        numbers[mode] = run_layout(folder, mode, "model", settings)["numbers"]
    for mode, other in (("sharded", "copied"), ("copied", "sharded")):
        saved = f"{mode}/checkpoints/global_step_2"
        found = run_layout(
            folder, f"{mode} then {other}", "model", {"max_steps": 4, **modes[other]}, saved
        )
        numbers[f"{mode} then {other}"] = found["numbers"]
    return numbers


def test_a_checkpoint_of_copies_goes_on_in_shards_and_the_reverse(folder, tmp_path):
    for numbers in run_ranks(switch, 2, folder, tmp_path=tmp_path, timeout_s=150):
        for then in ("sharded then copied", "copied then sharded"):
            expected = numbers[then.split()[0]][2:]
            assert [row[0] for row in numbers[then]] == [3, 4]
            for mine, theirs in zip(numbers[then], expected, strict=True):
                assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-6)


def export_under_ddp(folder: Path) -> dict[str, torch.Tensor]:
    settings = training.arguments(folder / "exporting", max_steps=1, **DDP)
    _, module = training.train(folder, settings)
    module.export_weights(folder / "hf_ckpt")
    return training.weights_of(module)


def test_copies_are_exported_under_the_names_of_transformers(folder, tmp_path):
    weights, _ = run_ranks(export_under_ddp, 2, folder, tmp_path=tmp_path, timeout_s=150)
    exported = load_file(folder / "hf_ckpt" / "model.safetensors")
    assert training.is_bit_equal(exported, weights)


def keep_without_need(folder: Path) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("omnilit.strategies")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    over = {"fsdp": {"reshard_after_backward": False}, "max_steps": 1}
    training.train(folder, training.arguments(folder / "one", global_batch_size=1, **over))
    training.train(folder, training.arguments(folder / "two", global_batch_size=2, **over))
    return said


def test_a_step_of_one_micro_batch_has_nothing_to_keep_gathered_and_says_so(folder, tmp_path):
    (said,) = run_ranks(keep_without_need, 1, folder, tmp_path=tmp_path, timeout_s=150)
    (line,) = said
    assert line.startswith("reshard_after_backward: false keeps parameters from one micro-batch")
