"""Compiled to machine code against not compiled, with numbers: minutes, so not in every run."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from omnilit.config import MixedPrecisionConfig
from omnilit.kernels.machine import Machine
from omnilit.models.attention import BOUNDARY
from omnilit.models.blocks import decoder_blocks
from omnilit.models.compilation import EXPERTS, compile_blocks
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.models import gradients, packed_batch, tiny, worst_difference
from tests.unit.models.test_bind import MODULE_KERNELS, bind_reference_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# The first length is that of the hidden size, which the compiler takes for the same number
LENGTHS = ([64], [5, 9], [3, 40, 17, 2], [33], [100, 28], [7], [20, 44], [*range(1, 11)], [128])
SLOTS = ("rms_norm", "swiglu_mlp", "rotary_pos_emb")


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")


def train_many_lengths(
    cache: str, family: str, slots: tuple[str, ...], is_recomputed: bool
) -> dict[str, Any]:
    """The worst difference of loss and gradients, the graphs after each batch, and the breaks."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    fields = {f"{slot}_implementation": MODULE_KERNELS[f"{slot}_implementation"] for slot in slots}
    models = plain, compiled = tiny(family), tiny(family)
    with pytest.MonkeyPatch.context() as patch:
        bindings = [bind_reference_kernels(model, patch, fields) for model in models]
    if is_recomputed:
        for model in models:
            model.activation_checkpointing_enable()
    compilation = compile_blocks(decoder_blocks(compiled), Machine("cpu"))
    worst, graphs = 0.0, []
    for seed, lengths in enumerate(LENGTHS):
        batch = packed_batch(lengths, seed=seed)
        losses = []
        for model, binding in zip(models, bindings, strict=True):
            model.zero_grad()
            loss = binding.head.forward(model, batch).token_losses.sum() / sum(lengths)
            loss.backward()
            losses.append({"loss": loss.detach()})
        apart = worst_difference(gradients(compiled), gradients(plain))
        worst = max(worst, apart, worst_difference(losses[1], losses[0]))
        graphs.append(compilation.num_graphs)
        bindings[1].verify_called()
    return {"worst": worst, "graphs": graphs, "breaks": compilation.breaks}


@pytest.mark.parametrize(
    ("family", "slots", "is_recomputed"),
    [
        ("qwen3", SLOTS, False),
        ("qwen3", (), True),
        ("qwen3_moe", (), True),
        ("gemma3", SLOTS[:1], False),
        ("gpt_oss", (), False),
        ("deepseek_v3", SLOTS[:2], False),
    ],
)
def test_many_lengths_run_the_same_few_graphs(family, slots, is_recomputed, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    (found,) = run_ranks(
        train_many_lengths,
        1,
        cache,
        family,
        slots,
        is_recomputed,
        tmp_path=tmp_path,
        timeout_s=1500,
    )
    say(capsys, f"{family}: {found['worst']:.1e} apart, graphs by batch {found['graphs']}")
    # fp32, fused and summed otherwise; plain models of two implementations differ by as much
    assert found["worst"] <= 1e-5
    graphs = found["graphs"]
    assert 0 < graphs[-1] <= 16
    assert graphs[2:] == [graphs[2]] * (len(LENGTHS) - 2)  # nothing new after the second length
    assert all(BOUNDARY in reason or EXPERTS in reason for reason in found["breaks"])


def run(folder: Path, precision: str, is_on: bool) -> Any:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    settings = training.arguments(
        folder / "run",
        max_steps=10,
        global_batch_size=4,
        eval_steps=5,
        enable_compile=is_on,
        recompute=True,
        mixed=MixedPrecisionConfig(enable=precision == "bf16"),
    )
    data = {"eval_path": str(folder / "eval.jsonl")}
    log, module = training.train(folder, settings, data=data)
    compilation = module.assembled.compilation
    num_graphs = compilation.num_graphs if compilation is not None else 0
    return training.numbers(log), training.weights_of(module), num_graphs


@pytest.fixture(scope="module")
def plain_steps(tmp_path_factory):
    """The folder of a model and its data, and ten steps there on 2 ranks in fp32, not compiled."""
    folder = tmp_path_factory.mktemp("compiled")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 60)
    training.write_conversations(folder / "eval.jsonl", 9, seed=1)
    return folder, run_on_two(folder, "fp32", False)


def run_on_two(folder: Path, precision: str, is_on: bool) -> Any:
    found, _ = run_ranks(run, 2, folder, precision, is_on, tmp_path=folder, timeout_s=800)
    return found


def apart(steps: Sequence[Any], others: Sequence[Any]) -> dict[str, list[float]]:
    """By which part of them losses and gradient norms of two runs differ, step by step."""
    return {
        name: [abs(a[i] / b[i] - 1) for a, b in zip(steps, others, strict=True)]
        for i, name in ((1, "loss"), (2, "grad_norm"))
    }


def test_ten_steps_on_two_ranks_are_those_of_blocks_not_compiled(plain_steps, capsys):
    folder, (plain, first, _) = plain_steps
    compiled, last, graphs = run_on_two(folder, "fp32", True)
    worst = {name: max(values) for name, values in apart(compiled, plain).items()}
    bias = statistics.fmean(a[1] - b[1] for a, b in zip(compiled, plain, strict=True))
    weights = max(float((last[name] - first[name]).abs().max()) for name in first)
    say(capsys, f"fp32, 10 steps on 2 ranks, {graphs} graphs: {worst}, {weights:.1e} in weights")
    assert graphs <= 16
    assert worst["loss"] <= 1e-5  # another order of sums
    assert worst["grad_norm"] <= 1e-4
    assert abs(bias) <= 1e-5


def test_ten_steps_in_bf16_are_as_near_to_fp32_compiled_as_not(plain_steps, capsys):
    folder, (exact, _, _) = plain_steps
    runs = {is_on: run_on_two(folder, "bf16", is_on) for is_on in (True, False)}
    ours, eager = (
        {name: statistics.fmean(values) for name, values in apart(runs[is_on][0], exact).items()}
        for is_on in (True, False)
    )
    say(capsys, f"bf16, 10 steps on 2 ranks: {ours} from fp32 compiled, {eager} not compiled")
    assert runs[True][2] <= 16
    # The compiler rounds once where separate operations round each time, so it should be nearer
    assert all(0 < ours[name] <= 1.5 * eager[name] for name in eager)
