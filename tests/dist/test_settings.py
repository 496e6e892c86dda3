"""What a setting says is what a run does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from omnilit.config import DataloaderConfig, MixedPrecisionConfig, OpsImplementationConfig
from omnilit.errors import TrainingError
from omnilit.modules import SFTModule
from omnilit.modules.loaders import choose_workers
from omnilit.parallel.fsdp import fsdp_modules
from omnilit.testing import run_ranks
from omnilit.types import LossTerm, MicroBatch
from tests.helpers import training
from tests.helpers.tokenizers import build_tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 40)
    lines = [json.dumps({"text": "the quick brown fox " * (3 + n)}) for n in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


class Diverging(SFTModule):
    """Its loss is infinite in the steps named by `bad`."""

    bad: tuple[int, ...] = (2,)

    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        terms = super().loss_terms(batch)
        if self.trainer.global_step + 1 in self.bad:
            terms["lm"] = LossTerm(terms["lm"].sum * float("inf"))
        return terms


class AlwaysDiverging(Diverging):
    """Every step."""

    bad = tuple(range(100))


class Weights(training.StepLog):
    """The weights after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SFTModule)
        self.weights.append(training.weights_of(pl_module))


def run(folder: Path, **over: Any) -> dict[str, Any]:
    model, data = over.pop("model", {}), over.pop("data", {})
    settings = training.arguments(folder / "run", **{"max_steps": 2, **over})
    log, module = training.train(folder, settings, model=model, data=data)
    policy = module.assembled
    return {
        "numbers": training.numbers(log),
        "weights": training.weights_of(module),
        "dtypes": {p.dtype for p in policy.model.parameters()},
        "precision": str(policy.precision),
        "kernels": policy.kernels.names(),
    }


def run_precisions(folder: Path) -> dict[str, dict[str, Any]]:
    mixed = {
        "fp32": MixedPrecisionConfig(enable=False),
        "bf16": MixedPrecisionConfig(param_dtype="bfloat16"),
        "reduce": MixedPrecisionConfig(param_dtype="float32", reduce_dtype="bfloat16"),
        "pure": MixedPrecisionConfig(enable=False, master_dtype="bfloat16"),
    }
    return {name: run(folder, mixed=config) for name, config in mixed.items()}


def test_precisions_store_compute_and_reduce_as_they_say(folder, tmp_path):
    (found, _) = run_ranks(run_precisions, 2, folder, tmp_path=tmp_path, timeout_s=150)
    first = {name: result["numbers"][0] for name, result in found.items()}
    exact = first["fp32"]
    assert found["bf16"]["dtypes"] == {torch.float32}
    assert found["bf16"]["precision"] == "computes in bfloat16, stores float32"
    assert found["pure"]["dtypes"] == {torch.bfloat16}
    for name in ("bf16", "pure"):
        assert 0 < abs(first[name][1] - exact[1]) < 0.05 * exact[1]
    assert first["reduce"][1] == exact[1]  # the forward is float32 there
    assert 0 < abs(first["reduce"][2] - exact[2]) < 0.02 * exact[2]


def run_variants(folder: Path) -> dict[str, dict[str, Any]]:
    fully: dict[str, Any] = {
        "cross_entropy_loss_implementation": "eager",
        "attn_implementation": "eager",
    }
    unused: dict[str, Any] = {
        "load_balancing_loss_implementation": "eager",
        "rms_norm_gated_implementation": "eager",
        "causal_conv1d_implementation": "eager",
    }
    eager = OpsImplementationConfig(preset="eager")
    text = {"train_path": str(folder / "text.jsonl"), "data_type": "plaintext", "text_keys": "text"}
    return {
        "base": run(folder),
        "kernels": run(
            folder, model={"ops_implementation": OpsImplementationConfig(**fully, **unused)}
        ),
        "preset": run(folder, model={"ops_implementation": eager}),
        "clip": run(folder, optimizer={"max_grad_norm": 0.01}),
        "no clip": run(folder, optimizer={"max_grad_norm": 0.0}),
        "other data": run(folder, seed=7),
        "left": run(folder, data={"max_seq_len": 16, "truncation_side": "left"}),
        "right": run(folder, data={"max_seq_len": 16, "truncation_side": "right"}),
        "text": run(folder, max_steps=None, data={**text, "train_size": None, "max_seq_len": 32}),
    }


def test_settings_of_one_process_do_what_they_say(folder, tmp_path):
    (found,) = run_ranks(run_variants, 1, folder, tmp_path=tmp_path, timeout_s=150)
    base = found["base"]
    assert base["kernels"]["attn_implementation"] == "sdpa"
    assert found["preset"]["kernels"] == dict.fromkeys(base["kernels"], "eager")
    for name in ("kernels", "preset"):
        assert found[name]["kernels"]["cross_entropy_loss_implementation"] == "eager"
        for mine, theirs in zip(found[name]["numbers"], base["numbers"], strict=True):
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
    norms = {name: result["numbers"][0][2] for name, result in found.items()}
    assert norms["clip"] == norms["no clip"] == norms["base"]  # before clipping
    assert not training.is_bit_equal(found["clip"]["weights"], found["no clip"]["weights"])
    assert found["other data"]["numbers"] != base["numbers"]
    assert found["left"]["numbers"] != found["right"]["numbers"]
    tokenizer = build_tokenizer()
    lengths = [len(tokenizer.encode("the quick brown fox " * (3 + n))) + 1 for n in range(12)]
    targets = sum(length - math.ceil(length / 32) for length in lengths)  # one less a chunk
    assert sum(tokens for *_, tokens in found["text"]["numbers"]) == targets


def run_resharding(folder: Path) -> list[Any]:
    results = []
    for is_freed in (True, False):
        settings = training.arguments(folder / "run", max_steps=2)
        fsdp = settings.accelerator.fsdp_config
        object.__setattr__(fsdp, "reshard_after_forward", is_freed)
        object.__setattr__(settings.accelerator, "dp_shard_size", 2)
        log, module = training.train(folder, settings)
        units = fsdp_modules(module.assembled.model)
        groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        kept = [group.post_forward_mesh_info is None for group in groups if group is not None]
        results.append((training.numbers(log), kept))
    return results


def test_resharding_frees_the_blocks_and_changes_no_bit(folder, tmp_path):
    results = run_ranks(run_resharding, 2, folder, tmp_path=tmp_path, timeout_s=150)
    (freed, freed_units), (kept, kept_units) = results[0]
    assert freed == kept
    assert all(kept_units)
    assert freed_units.count(False) == 3  # embedding and two blocks; the head and the root stay


def run_diverging(folder: Path) -> tuple[Any, Any, str]:
    log, weights = training.StepLog(), Weights()
    settings = training.arguments(folder / "run", max_steps=3)
    log, _ = training.train(folder, settings, module_class=Diverging, callbacks=(weights,))
    message = ""
    always = training.arguments(folder / "run", max_steps=9, optimizer={"max_skipped_steps": 3})
    try:
        training.train(folder, always, module_class=AlwaysDiverging)
    except TrainingError as error:
        message = str(error)
    return log.results, weights.weights, message


def test_a_step_without_a_finite_norm_moves_nothing_and_too_many_end_the_run(folder, tmp_path):
    for results, weights, message in run_ranks(
        run_diverging, 2, folder, tmp_path=tmp_path, timeout_s=150
    ):
        assert [result.skipped_steps for result in results] == [0, 1, 1]
        assert [result.step for result in results] == [1, 2, 3]
        if weights[0]:  # gathered on rank 0
            assert training.is_bit_equal(weights[0], weights[1])
            assert not training.is_bit_equal(weights[1], weights[2])
        assert message.startswith("the gradient norm was not finite in 3 steps in a row")


@pytest.mark.parametrize(("device", "is_pinned"), [("cpu", False), ("cuda", True)])
def test_workers_are_as_configured_and_pinned_only_for_an_accelerator(device, is_pinned):
    config = DataloaderConfig(num_workers=3, prefetch_factor=5, pin_memory=True)
    workers = choose_workers(config, torch.device(device))
    assert (workers.num_workers, workers.prefetch_factor) == (3, 5)
    assert workers.pin_memory is is_pinned
