"""Held-out prompts that are completed at evaluations: what plain transformers generates."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from omnilit.models.build import stop_tokens
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS, SAMPLES, MAX_TOKENS = 3, 3, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    training.write_model(folder / "model")
    training.write_model(folder / "moe", "qwen3_moe", output_router_logits=True)
    training.write_model(folder / "dropout", attention_dropout=0.2)
    training.write_conversations(folder / "train.jsonl", 40)
    training.write_conversations(folder / "eval.jsonl", 9, seed=1)
    return folder


def run(folder: Path, name: str, over: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank of however many there are, complete, and export."""
    model = over.pop("model", "model")
    given = {"eval_samples": SAMPLES, "eval_samples_max_tokens": MAX_TOKENS, **over}
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": 1, **given}
    log, module = training.train(
        folder,
        training.arguments(folder / name, **settings),
        model={"config_path": str(folder / model)},
        data={"eval_path": str(folder / "eval.jsonl")},
    )
    module.export_weights(folder / name / "export")
    return {"steps": training.numbers(log), "eval": module.eval_result}


def run_all(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run(folder, name, dict(over)) for name, over in cases.items()}


def samples_of(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "eval_samples.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def generate(export: Path, samples: list[dict[str, Any]]) -> list[str]:
    """What plain transformers goes on with, with a cache and one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    model: Any = AutoModelForCausalLM.from_pretrained(export).eval()
    stop = stop_tokens(model.generation_config, tokenizer)
    found = []
    for sample in samples:
        prompt = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(
                **prompt,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop[0],
            )[0, prompt["input_ids"].shape[1] :].tolist()
        found.append(tokenizer.decode(list(takewhile(lambda token: token not in stop, tokens))))
    return found


ONE: dict[str, dict[str, Any]] = {
    "alone": {},
    "moe": {"model": "moe"},
    "dropout": {"model": "dropout"},
    "dropout, no samples": {
        "model": "dropout",
        "eval_samples": 0,
        "eval_samples_max_tokens": 64,
        "eval_steps": 0,
    },
}
TWO: dict[str, dict[str, Any]] = {
    "data": {},
    "one prompt": {"eval_samples": 1},
    "ulysses": {"accelerator": {"ulysses_size": 2}},
    "context": {"accelerator": {"cp_size": 2, "cp_method": "ring"}},
    "tensor": {"accelerator": {"tp_size": 2}},
    "pipeline": {"accelerator": {"pp_size": 2}},
    "moe, experts spread": {"model": "moe", "accelerator": {"ep_size": 2}},
    "moe, pipeline": {"model": "moe", "accelerator": {"pp_size": 2}},
}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("1")
    return run_ranks(run_all, 1, folder, ONE, tmp_path=path, timeout_s=170)[0]


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    return run_ranks(run_all, 2, folder, TWO, tmp_path=tmp_path_factory.mktemp("2"), timeout_s=170)


@pytest.mark.parametrize("name", ["alone", "moe"])
def test_completions_are_what_transformers_generates_from_the_export(name, folder, alone):
    samples = samples_of(folder, name)
    steps = [sample["step"] for sample in samples]
    assert steps == [step for step in range(1, STEPS + 1) for _ in range(SAMPLES)]
    last = samples[-SAMPLES:]
    assert [sample["completion"] for sample in last] == generate(folder / name / "export", last)
    assert [sample["sample"] for sample in last] == [1, 2, 3]
    assert all(sample["prompt"].endswith("<|im_start|>assistant\n") for sample in last)
    first = json.loads((folder / "eval.jsonl").read_text().splitlines()[0])["messages"]
    assert last[0]["expected"] == f"{first[-1]['content']}<|im_end|>"
    assert alone[name]["eval"]["eval_samples_s"] > 0
    assert 0 < alone[name]["eval"]["eval_samples_tokens"] <= SAMPLES * MAX_TOKENS


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_say_what_one_says(name, folder, alone, two):
    expected = samples_of(folder, name.partition(",")[0] if "," in name else "alone")
    number = TWO[name].get("eval_samples", SAMPLES)
    assert samples_of(folder, name) == [one for one in expected if one["sample"] <= number]


def test_samples_leave_every_random_state_as_it_was(alone):
    assert alone["dropout"]["steps"] == alone["dropout, no samples"]["steps"]
