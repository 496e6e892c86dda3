"""Axes together that no other test has together, on odd models: the steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnilit.config import GradientCheckpointingConfig, OffloadConfig
from omnilit.testing import run_ranks
from tests.helpers.layouts import DDP
from tests.helpers.tasks import check_run, run_tasks, write_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "one_key_head": {"num_key_value_heads": 1},
    "tied": {"family": "qwen3_tied"},
    "wide_window": {"family": "gemma3", "sliding_window": 30},  # wider than a part of a row
    "sinks": {"family": "gpt_oss"},
    "latent": {"family": "deepseek_v3"},
    "experts": {"family": "qwen3_moe", "output_router_logits": True},
    "one_expert": {"family": "qwen3_moe", "num_experts_per_tok": 1, "norm_topk_prob": False},
}
REENTRANT: dict[str, Any] = {
    "recompute": GradientCheckpointingConfig(enable=True, enable_reentrant=True)
}
RING: dict[str, Any] = {"cp_size": 2, "cp_method": "ring"}
ASYNC: dict[str, Any] = {"ulysses_size": 2, "enable_async": True}
MOVED: dict[str, Any] = {"offload_config": OffloadConfig(enable_activation=True)}


def case(model: str, more: dict[str, Any] | None = None, **accelerator: Any) -> dict[str, Any]:
    return {"model": model, "accelerator": accelerator, **(more or {})}


CASES = {
    "copies of a ring": case("dense", DDP, **RING),
    "copies of split matrices, in host memory": case(
        "tied", {"fsdp": {"fsdp_mode": "ddp", "offload": True}}, tp_size=2, cp_size=2
    ),
    "HSDP of split matrices": case("dense", dp_replicate_size=2, dp_shard_size=1, tp_size=2),
    "HSDP of a ring, experts spread outside": case(
        "experts", dp_replicate_size=2, ep_size=2, ep_outside=True, **RING
    ),
    "overlapped, split, reentrant": case("dense", REENTRANT, tp_size=2, **ASYNC),
    "overlapped in a ring, recomputed": case("dense", {"recompute": True}, **RING, **ASYNC),
    "a compiled ring": case("dense", {"enable_compile": True}, **RING),
    "more ranks than key heads, overlapped": case(
        "one_key_head", ulysses_size=4, enable_async=True
    ),
    "a window over parts": case("wide_window", cp_size=4),
    "a window over parts of a ring": case("wide_window", cp_size=4, cp_method="ring"),
    "sinks, split, spread and in a ring": case("sinks", tp_size=2, ep_size=2, **RING),
    "sinks of split heads that are traded": case("sinks", tp_size=2, ulysses_size=2),
    "latent heads, everything spread": case("latent", tp_size=2, ep_size=2, ulysses_size=2),
    "experts over all ranks, tokens split twice": case(
        "experts", {"recompute": True}, ep_size=4, ep_outside=True, tp_size=2, ulysses_size=2
    ),
    "experts over all ranks, a ring": case("experts", ep_size=4, **RING),
    "experts, activations moved": case(
        "experts", {"recompute": True}, ep_size=2, ulysses_size=2, **MOVED
    ),
    "experts, reduced each time, in host memory": case(
        "experts", {"fsdp": {"offload": True, "sync_each_micro_batch": True}}, ep_size=2
    ),
    "one expert a token, reentrant": case("one_expert", REENTRANT, ep_size=4, tp_size=2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    folder: Path = tmp_path_factory.mktemp("task")
    write_task(folder, **MODELS)
    alone = {f"{name} alone": {"model": name} for name in MODELS}
    (one,) = run_ranks(run_tasks, 1, folder, alone, tmp_path=folder, timeout_s=300)
    return one, run_ranks(run_tasks, 4, folder, CASES, tmp_path=folder, timeout_s=600)


@pytest.mark.parametrize("name", CASES)
def test_axes_together_train_the_steps_of_one_process(name: str, runs: tuple[Any, list[Any]]):
    one, ranks = runs
    for rank in ranks:
        check_run(rank[name], one[f"{CASES[name]['model']} alone"])
