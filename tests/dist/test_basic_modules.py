"""Classes of `model.basic_modules` are units of their own, and change no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnilit.parallel.fsdp import fsdp_modules
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "dense": ("qwen3", ["Qwen3MLP", "Linear"], {"recompute": True}),
    "experts": ("qwen3_moe", ["Qwen3MoeExperts", "Qwen3MoeTopKRouter"], {}),
    "spread": ("qwen3_moe", ["Qwen3MoeExperts", "Qwen3MoeTopKRouter"], {"ep_size": 2}),
    "stages": ("qwen3", ["Embedding", "Qwen3Attention"], {"pp_size": 2}),
}


def run_case(folder: Path, name: str, *, with_basic: bool) -> dict[str, Any]:
    family, basic, over = CASES[name]
    sizes = {key: value for key, value in over.items() if key.endswith("_size")}
    settings = training.arguments(
        folder / "run",
        max_steps=2,
        global_batch_size=4,
        accelerator=sizes,
        recompute=over.get("recompute", False),
    )
    model = {"config_path": str(folder / family), "basic_modules": basic if with_basic else []}
    log, module = training.train(folder, settings, model=model)
    units = [type(unit).__name__ for unit in fsdp_modules(module.assembled.model)]
    return {"numbers": training.numbers(log), "units": units}


def run_all(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {
        name: (run_case(folder, name, with_basic=False), run_case(folder, name, with_basic=True))
        for name in CASES
    }


def test_further_units_change_what_is_gathered_at_a_time_and_nothing_else(tmp_path):
    for family in ("qwen3", "qwen3_moe"):
        training.write_model(tmp_path / family, family)
    training.write_conversations(tmp_path / "train.jsonl", 20)
    for rank, found in enumerate(run_ranks(run_all, 2, tmp_path, tmp_path=tmp_path, timeout_s=150)):
        for name, (without, with_basic) in found.items():
            assert with_basic["numbers"] == without["numbers"], name
            more = set(with_basic["units"]) - set(without["units"])
            own = {f"FSDP{kind}" for kind in CASES[name][1]}
            if name == "stages":
                own -= {"FSDPEmbedding"}  # the first stage's, and a unit there in any case
            assert more == own - set(without["units"]), (rank, name)
