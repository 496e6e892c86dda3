"""Runs that train adapters, on one process and on several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from omnilit.config import LoraArguments
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.models import tiny

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = LoraArguments(enable=True, rank=4, alpha=12.0)
SPARSE = replace(DENSE, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
LINEAR = replace(DENSE, target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o")])
CASES: dict[str, tuple[str, LoraArguments, dict[str, Any]]] = {
    "fsdp2": ("qwen3", DENSE, {}),
    "ddp": ("qwen3", DENSE, {"fsdp": {"fsdp_mode": "ddp"}}),
    "recomputed": ("qwen3", DENSE, {"recompute": True}),
    "whole modules": ("qwen3", replace(DENSE, modules_to_save=["lm_head"]), {}),
    "ulysses": ("qwen3", DENSE, {"accelerator": {"ulysses_size": 2}}),
    "async": ("qwen3", DENSE, {"accelerator": {"ulysses_size": 2, "enable_async": True}}),
    "context": ("qwen3", DENSE, {"accelerator": {"cp_size": 2}}),
    "tensor": ("qwen3", DENSE, {"accelerator": {"tp_size": 2}}),
    "pipeline": ("qwen3", DENSE, {"accelerator": {"pp_size": 2}}),
    "late layers": (
        "qwen3",
        replace(DENSE, target_modules=r".*layers\.1\..*_proj"),
        {"accelerator": {"pp_size": 2}},
    ),
    "all of experts": ("qwen3_moe", DENSE, {}),
    "experts": ("qwen3_moe", SPARSE, {}),
    "spread": ("qwen3_moe", SPARSE, {"accelerator": {"ep_size": 2}}),
    "all of spread": ("qwen3_moe", DENSE, {"accelerator": {"ep_size": 2}}),
    "linear of split experts": ("qwen3_moe", LINEAR, {"accelerator": {"tp_size": 2}}),
    "offloaded": ("qwen3", DENSE, {"fsdp": {"offload": True}}),
}


def run_case(folder: Path, name: str, *, is_split: bool, **more: Any) -> dict[str, Any]:
    """Train a case on this rank of however many there are.

    Args:
        folder: With the inputs.
        name: Of the case.
        is_split: In its layout; else as one process does.
        more: Further settings; `load_path`, `out` and `adapter_path` are of the run itself.
    """
    load_path, out = more.pop("load_path", None), more.pop("out", folder / "runs" / name)
    family, lora, over = CASES[name]
    lora = replace(lora, adapter_path=more.pop("adapter_path", None))
    over = {**(over if is_split else {}), **more}
    settings = training.arguments(out, **{"max_steps": 3, "global_batch_size": 4, **over})
    model = {"config_path": None, "model_path": str(folder / family), "lora": lora}
    log, module = training.train(folder, settings, model=model, load_path=load_path)
    trained = {n: (p.dtype, p.requires_grad) for n, p in module.assembled.model.named_parameters()}
    return {
        "numbers": training.numbers(log),
        "first": log.first_weights,
        "weights": training.weights_of(module),
        "trained": trained,
    }


def run_all(folder: Path, *, is_split: bool, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: run_case(folder, name, is_split=is_split) for name in names}


def run_split(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return run_all(folder, is_split=True, names=names)


def run_alone(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return run_all(folder, is_split=False, names=names)


def write_inputs(folder: Path) -> None:
    """Two tiny models with weights, and conversations."""
    for family in ("qwen3", "qwen3_moe"):
        training.write_model(folder / family, family)
        size = len(AutoTokenizer.from_pretrained(folder / family))
        tiny(family, vocab_size=size).save_pretrained(folder / family)
    training.write_conversations(folder / "train.jsonl", 20)


def check_layouts(folder: Path, names: list[str], *, tmp_path: Path) -> None:
    """Hold runs of two ranks against those of one.

    Raises:
        AssertionError: A run begins with other adapters, takes other steps or leaves some out.
    """
    (alone,) = run_ranks(run_alone, 1, folder, names, tmp_path=tmp_path, timeout_s=170)
    split, _ = run_ranks(run_split, 2, folder, names, tmp_path=tmp_path, timeout_s=170)
    for name in names:
        one, two = alone[name], split[name]
        assert training.is_bit_equal(one["first"], two["first"]), name
        for mine, theirs in zip(two["numbers"], one["numbers"], strict=True):
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5), name
            assert mine[3] == theirs[3]
        losses = {loss for _, loss, *_ in one["numbers"]}
        assert len(losses) == 3, name
        moved = [n for n in one["first"] if not torch.equal(one["first"][n], one["weights"][n])]
        assert len(moved) == len(one["first"]), name
