"""Whole runs of models with linear attention on every axis, beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnilit.checkpoint.layout import step_folder
from omnilit.kernels.machine import Machine
from omnilit.models.attention import BOUNDARY
from omnilit.models.bind import bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.models.compilation import EXPERTS, compile_blocks
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.models import gradients, packed_batch, tiny, worst_difference
from tests.helpers.spread import cpu_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 3
# small steps: large ones make more of a rounding than one gradient has
CALM: dict[str, Any] = {"optimizer": {"lr": 1e-3}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"accelerator": {"tp_size": 2}, "recompute": True},
    "pp": {"accelerator": {"pp_size": 2}},
    "ep": {"accelerator": {"ep_size": 2}},
    "ulysses": {"accelerator": {"ulysses_size": 2}, "recompute": True},
}


def run(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in names:
        settings = {"global_batch_size": 4, "max_steps": STEPS, **CALM, **LAYOUTS.get(name, {})}
        out = folder / name
        saved = {"save_steps": STEPS, "hf_save_steps": STEPS, "save_hf_weights": True}
        log, module = training.train(folder, training.arguments(out, checkpoint=saved, **settings))
        found.append(
            {
                "numbers": training.numbers(log),
                "first": log.first_weights,
                "last": training.weights_of(module),
            }
        )
    return found


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
def test_a_run_on_any_axis_is_that_of_one_process(family, tmp_path):
    training.write_model(tmp_path / "model", family)
    training.write_conversations(tmp_path / "train.jsonl", 30)
    ((alone,),) = run_ranks(run, 1, tmp_path, ["alone"], tmp_path=tmp_path, timeout_s=250)
    assert len(alone["numbers"]) == STEPS
    ranks = run_ranks(run, 2, tmp_path, list(LAYOUTS), tmp_path=tmp_path, timeout_s=340)
    for number, name in enumerate(LAYOUTS):
        for rank in ranks:
            for mine, theirs in zip(rank[number]["numbers"], alone["numbers"], strict=True):
                assert (mine[0], mine[3]) == (theirs[0], theirs[3]), name
                assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-4), name
        assert training.is_bit_equal(ranks[0][number]["first"], alone["first"]), name
    for name in ("alone", *LAYOUTS):
        check_export(step_folder(tmp_path / name, STEPS) / "hf_ckpt", alone["last"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's tracer
def test_compiled_blocks_give_the_same_gradients_at_any_length(monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # which inductor sets
    models = [tiny("qwen3_5"), tiny("qwen3_5")]
    bindings = [bind_kernels(model, cpu_kernels()) for model in models]
    compilation = compile_blocks(decoder_blocks(models[1]), Machine("cpu"))
    for lengths in ((5, 1, 70, 9), (30, 20)):
        batch = packed_batch(lengths)
        for model, binding in zip(models, bindings, strict=True):
            binding.head.forward(model, batch).token_losses.mean().backward()
    bindings[1].verify_called()
    assert worst_difference(*map(gradients, models)) <= 1e-4
    known = [reason for reason in compilation.breaks if BOUNDARY in reason or EXPERTS in reason]
    assert known == list(compilation.breaks)


def check_export(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Plain transformers reads the export, and has the weights of the run."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-3, atol=1e-4)
