"""Runs with experts spread over ranks: the steps of one process, and checkpoints that move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from omnilit.callbacks.expert_load import ExpertLoad
from omnilit.callbacks.layer_norms import LayerGradNorms
from omnilit.callbacks.startup import parameter_rows
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.gradients import compare
from tests.helpers.layouts import Watcher
from tests.helpers.tokenizers import build_tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
INSIDE: dict[str, Any] = {"ep_size": 2}
COPIES: dict[str, Any] = {"ep_size": 2, "ep_outside": True, "dp_replicate_size": 2}
OUTSIDE: dict[str, Any] = {"ep_size": 2, "ep_outside": True}
STEPS, SAVED = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    over = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    training.write_model(folder / "model", "qwen3_moe", **over)
    training.write_conversations(folder / "train.jsonl", 60)
    return folder


def run(
    folder: Path, out: str, accelerator: dict[str, Any], resume: str | None = None
) -> dict[str, Any]:
    """Four steps, saved at the second, or the last two of them from a checkpoint."""
    arguments = training.arguments(
        folder / out,
        global_batch_size=8,
        max_steps=STEPS,
        pad_to_length=True,
        recompute=True,
        accelerator=accelerator,
        checkpoint={"save_steps": SAVED} if resume is None else {},
    )
    watcher = Watcher()
    _, module = training.train(
        folder,
        arguments,
        load_path=folder / resume / f"checkpoints/global_step_{SAVED}" if resume else None,
        callbacks=(ExpertLoad(2), LayerGradNorms(2), watcher),
    )
    if resume is None:
        module.export_weights(folder / out / "hf_ckpt")
    result = watcher.results[-1]
    return {
        "numbers": training.numbers(watcher),
        "terms": [dict(step.losses) for step in watcher.results],
        "flops": result.flops,
        "first": watcher.first_weights,
        "gradients": watcher.gradients,
        "last": training.weights_of(module),
        "parameters": parameter_rows([], module)[1],
        "lines": [json.loads(line) for line in (folder / out / "metrics.jsonl").open()],
    }


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("one")
    return run_ranks(run, 1, folder, "one", {}, tmp_path=tmp_path, timeout_s=150)[0]


def run_four(folder: Path) -> dict[str, dict[str, Any]]:
    found = {"four": run(folder, "four", INSIDE)}
    dist.barrier()  # rank 0 has written the checkpoint
    found["four from one"] = run(folder, "four from one", COPIES, "one")
    return found


@pytest.fixture(scope="module")
def four(folder, one, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("four")
    return run_ranks(run_four, 4, folder, tmp_path=tmp_path, timeout_s=200)


def expert_numbers(line: dict[str, Any]) -> dict[str, float]:
    return {n: v for n, v in line.items() if n.startswith(("expert_load/", "grad_norm/"))}


def test_four_ranks_train_the_steps_of_one_process(one, four):
    for rank in four:
        found = rank["four"]
        for mine, theirs in zip(found["numbers"], one["numbers"], strict=True):
            assert (mine[0], mine[3]) == (theirs[0], theirs[3])
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        compare(found["gradients"], one["gradients"])
    assert training.is_bit_equal(four[0]["four"]["first"], one["first"])


def test_the_balance_loss_is_that_of_one_process(one, four):
    for mine, theirs in zip(four[0]["four"]["terms"], one["terms"], strict=True):
        assert mine["balance"] == pytest.approx(theirs["balance"], rel=1e-5)
        assert mine["balance"] > 0.5  # two experts of eight are chosen, with a weight of 0.5


def test_loads_and_norms_of_layers_are_those_of_one_process(one, four):
    for mine, theirs in zip(four[0]["four"]["lines"], one["lines"], strict=True):
        assert expert_numbers(mine) == pytest.approx(expert_numbers(theirs), rel=1e-5)
    assert [bool(expert_numbers(line)) for line in one["lines"]] == [False, True, False, True]
    line = one["lines"][1]
    shares = [line[f"expert_load/model.layers.1.mlp.experts/{expert}"] for expert in range(8)]
    assert sum(shares) == pytest.approx(1.0)
    ratio = line["expert_load/model.layers.1.mlp.experts/max_over_mean"]
    assert ratio == pytest.approx(8 * max(shares))


def test_parameters_and_operations_are_counted_whole(one, four):
    assert four[0]["four"]["parameters"] == one["parameters"]
    assert four[0]["four"]["flops"] == one["flops"]


def check_resumed(found: dict[str, Any], saved_in: dict[str, Any]) -> None:
    assert [row[0] for row in found["numbers"]] == [3, 4]
    for mine, theirs in zip(found["numbers"], saved_in["numbers"][2:], strict=True):
        assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)


def test_a_checkpoint_of_one_process_goes_on_with_experts_spread(one, four):
    for rank in four:
        check_resumed(rank["four from one"], one)


def test_a_checkpoint_of_spread_experts_goes_on_at_other_layouts(folder, four, tmp_path):
    first: list[dict[str, torch.Tensor]] = []
    for num_ranks, accelerator in ((1, {}), (2, OUTSIDE)):
        out = f"{num_ranks} from four"
        ranks = run_ranks(run, num_ranks, folder, out, accelerator, "four", tmp_path=tmp_path)
        first.append(ranks[0]["first"])
        for rank in ranks:
            check_resumed(rank, four[0]["four"])
    assert training.is_bit_equal(*first)


def test_an_export_has_the_layout_of_the_hub_and_the_weights_of_the_run(folder, four):
    exported = folder / "four" / "hf_ckpt"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    weights = four[0]["four"]["last"]
    assert all(torch.equal(model.get_parameter(name), weights[name]) for name in weights)
    names = (exported / "model.safetensors").read_bytes()[:20_000]
    assert b"mlp.experts.7.gate_proj.weight" in names
    assert len(build_tokenizer()) == model.config.vocab_size
