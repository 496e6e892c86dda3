"""A rehearsed rank holds and sends what sums over the model's sizes say, and what a step sends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilit.config import (
    AcceleratorConfig,
    FSDPConfig,
    GradientCheckpointingConfig,
    MixedPrecisionConfig,
    OpsImplementationConfig,
    OptimizerConfig,
    TrainingArguments,
)
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.models.sequence import layout_of
from omnilit.modules.assembly import ModelRequest, assemble_shards
from omnilit.parallel.fsdp import set_gradient_sync, set_resharding
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.pretend import pretend_ranks
from omnilit.parallel.sequence import split_sequence
from omnilit.tools import env
from omnilit.tools.rehearsal import Rehearsal, rehearse
from omnilit.tools.rehearsal_view import describe
from tests.helpers.collectives import GATHER, SCATTER, SUM, SentBytes
from tests.helpers.models import packed_batch, tiny_config

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, WIDTH, LAYERS = 64, 96, 256, 4, 2, 16, 2
ATTENTION = 2 * HIDDEN * WIDTH * (HEADS + KV_HEADS) + 2 * WIDTH
BLOCK = ATTENTION + 3 * HIDDEN * FFN + 2 * HIDDEN
ROOT = 2 * VOCAB * HIDDEN + HIDDEN
DENSE = LAYERS * BLOCK + ROOT
EXPERTS, EXPERT_FFN = 8, 32
MOE = (
    LAYERS * (ATTENTION + EXPERTS * HIDDEN + EXPERTS * 3 * HIDDEN * EXPERT_FFN + 2 * HIDDEN) + ROOT
)
NUM_TENSORS = LAYERS * 11 + 3
FP32, ADAMW = MixedPrecisionConfig(enable=False), OptimizerConfig()


def request(
    family: str = "qwen3",
    *,
    over: dict[str, Any] | None = None,
    mixed: MixedPrecisionConfig = FP32,
    fsdp: dict[str, Any] | None = None,
    optimizer: OptimizerConfig = ADAMW,
    **sizes: Any,
) -> ModelRequest:
    own = FSDPConfig(mixed_precision=mixed, **(fsdp or {}))
    train = TrainingArguments(
        accelerator=AcceleratorConfig(fsdp_config=own, **sizes),
        optimizer=optimizer,
        gradient_checkpointing=GradientCheckpointingConfig(enable=False),
        **(over or {}),
    )
    return ModelRequest(
        config=tiny_config(family),
        weights_path=None,
        strict=True,
        trust_remote_code=False,
        ops=OpsImplementationConfig(preset="eager"),
        given=frozenset(),
        train=train,
        accelerator=train.accelerator,
        is_resume=False,
    )


def run(asked: ModelRequest, world_size: int, rank: int = 0, tokens: int = 128) -> Rehearsal:
    return rehearse(asked, world_size=world_size, rank=rank, tokens=tokens)


def own(found: Rehearsal) -> int:
    return sum(parameter.own for parameter in found.parameters)


@pytest.mark.parametrize(("family", "whole"), [("qwen3", DENSE), ("qwen3_moe", MOE)])
def test_a_rank_holds_its_share_of_every_parameter(family, whole):
    found = run(request(family, dp_replicate_size=2), world_size=8)
    assert sum(parameter.numel for parameter in found.parameters) == whole
    assert own(found) == whole // 4
    assert found.parameter_bytes == found.gradient_bytes == whole // 4 * 4


def test_ranks_hold_a_model_between_them_once_a_copy():
    asked = request(dp_replicate_size=2)
    ranks = [own(run(asked, world_size=6, rank=rank)) for rank in range(6)]
    assert ranks[:3] == ranks[3:]
    assert sum(ranks) == 2 * DENSE


def test_moments_are_those_of_the_optimizer_that_is_asked_for():
    share = DENSE // 4
    counters = 4 * NUM_TENSORS  # one float32 count of steps a tensor
    assert run(request(), world_size=4).moment_bytes == 8 * share + counters
    small = OptimizerConfig(type="anyprecision_adamw")
    assert run(request(optimizer=small), world_size=4).moment_bytes == 4 * share + counters


@pytest.mark.parametrize("ep_outside", [False, True])
def test_experts_are_divided_by_both_of_their_axes(ep_outside):
    found = run(request("qwen3_moe", ep_size=4, ep_outside=ep_outside), world_size=8)
    assert own(found) == MOE // 8
    experts = [p for p in found.parameters if p.axis == "efsdp"]
    stacked = LAYERS * EXPERTS * 3 * HIDDEN * EXPERT_FFN
    assert sum(p.numel for p in experts) == stacked
    assert {p.ranks for p in experts} == {2}
    sent = {(one.axis, one.what.split()[0]): one.sent for one in found.traffic}
    assert sent["efsdp", "gather"] == 2 * 4 * stacked / 8
    assert sent["efsdp", "reduce-scatter"] == 4 * stacked / 8
    rows = 128 * 2
    assert sent["ep", "all-to-all"] == 4 * rows * HIDDEN * 4 * 3 / 4 * LAYERS


def test_tensor_parallelism_divides_matrices_and_copies_norms():
    found = run(request(tp_size=2), world_size=4)
    norms = LAYERS * (2 * HIDDEN + 2 * WIDTH) + HIDDEN
    assert own(found) == (DENSE - norms) // 4 + norms // 2
    assert {(p.axis, p.ranks) for p in found.parameters} == {("fsdp", 2)}
    sent = {one.axis: one.sent for one in found.traffic}
    # outputs of two matrices in forward, inputs of five in backward, embedding and head
    assert sent["tp"] == 128 * HIDDEN * 4 / 2 * 2 * (LAYERS * (2 + 5) + 2)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("schedule", [{}, {"pp_schedule": "interleaved", "pp_stages_per_rank": 2}])
def test_stages_hold_a_model_between_them(family, schedule):
    deep = 4
    asked = request(family, pp_size=2, **schedule)
    asked.config.num_hidden_layers = deep
    asked.config.layer_types = ["full_attention"] * deep
    ranks = [run(asked, world_size=4, rank=rank) for rank in range(4)]
    whole = DENSE if family == "qwen3" else MOE
    blocks = (whole - ROOT) // LAYERS * deep
    assert own(ranks[0]) + own(ranks[1]) == blocks // 2 + VOCAB * HIDDEN
    assert own(ranks[2]) + own(ranks[3]) == blocks // 2 + VOCAB * HIDDEN + HIDDEN
    ways = 1 if not schedule else 3
    for found in ranks:
        (sent,) = (one.sent for one in found.traffic if one.axis == "pp")
        assert sent == ways * 128 * HIDDEN * 4


def test_a_pattern_that_matches_in_another_stage_is_fine():
    optimizer = OptimizerConfig(no_decay_params=["lm_head"])
    ranks = [run(request(pp_size=2, optimizer=optimizer), 2, rank=rank) for rank in range(2)]
    assert all(found.moment_bytes > 8 * own(found) for found in ranks)


def test_what_is_offloaded_is_said_to_be_in_host_memory():
    text = describe(run(request(fsdp={"offload": True}), world_size=2))
    assert "what it holds in host memory" in text


def test_reducing_each_micro_batch_keeps_no_whole_gradients():
    fsdp, over = {"sync_each_micro_batch": True}, {"global_batch_size": 24}
    found = run(request(fsdp=fsdp, over=over), world_size=8)
    sent = {one.what: one.sent for one in found.traffic}
    assert sent["reduce-scatter gradients"] == 3 * 7 / 8 * 4 * DENSE
    assert found.unreduced_bytes == 0


def test_under_ddp_each_rank_holds_everything_and_sums_gradients_alone():
    found = run(request(fsdp={"fsdp_mode": "ddp"}), world_size=8)
    assert own(found) == DENSE
    (one,) = found.traffic
    assert (one.axis, one.ranks) == ("dp_replicate", 8)
    assert one.sent == 2 * 7 / 8 * DENSE * 4


def test_blocks_are_gathered_twice_the_ends_once_and_all_is_reduced_once_a_step():
    over = {"global_batch_size": 24}
    found = run(request(over=over, mixed=MixedPrecisionConfig()), world_size=8)
    assert found.step.micro_batches == 3
    sent = {one.what: one.sent for one in found.traffic}
    blocks = LAYERS * BLOCK
    assert sent["gather parameters"] == 7 / 8 * 2 * 3 * (2 * blocks + ROOT)
    assert sent["reduce-scatter gradients"] == 7 / 8 * 4 * DENSE
    assert found.unreduced_bytes == 4 * DENSE


@pytest.mark.parametrize(
    "fsdp", [{}, {"reshard_after_backward": False}, {"sync_each_micro_batch": True}]
)
@pytest.mark.parametrize("reshard_after_forward", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"dp_replicate_size": 2}])
def test_a_real_step_sends_what_the_formulas_say(fsdp, reshard_after_forward, sizes):
    options = {"reshard_after_forward": reshard_after_forward, **fsdp}
    asked = request(fsdp=options, over={"global_batch_size": 12}, **sizes)
    found = run(asked, world_size=6)
    expected = {(one.what.split()[0], one.ranks): one.sent for one in found.traffic}
    sent = send_of_a_step(asked, world_size=6, micro_batches=2)
    assert {what for what, _ in sent} <= {GATHER, SCATTER, SUM}
    assert sent == pytest.approx(expected)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3", {"tp_size": 2}),
        ("qwen3_moe", {"tp_size": 2}),
        ("deepseek_v3", {"tp_size": 2}),  # attention stays whole, experts that all tokens share
        ("deepseek_v2", {"tp_size": 2}),
        ("phi3", {"tp_size": 2}),  # joined projections, whose outputs are gathered
        ("gpt_oss", {"tp_size": 2}),
        ("qwen3", {"ulysses_size": 4}),
        ("deepseek_v3", {"tp_size": 2, "ulysses_size": 2}),
        ("qwen3", {"tp_size": 2, "ulysses_size": 2}),
        ("qwen3", {"cp_size": 2}),
        ("qwen3", {"cp_size": 2, "ulysses_size": 2}),
    ],
)
def test_activations_of_a_real_step_are_as_many_as_the_formulas_say(family, sizes):
    asked = request(family, **sizes)
    world_size, lengths = math.prod(sizes.values()), [60, 4]
    found = run(asked, world_size=world_size, tokens=sum(lengths))
    sent = send_of_a_step(asked, world_size=world_size, micro_batches=1, lengths=lengths)
    # but for norms and shared biases, and what the head adds up of two tokens without a label
    assert sum(sent.values()) == pytest.approx(sum(one.sent for one in found.traffic), rel=0.02)


def send_of_a_step(
    asked: ModelRequest, *, world_size: int, micro_batches: int, lengths: Sequence[int] = (9, 7)
) -> Counter[tuple[str, int]]:
    """Run a step on the CPU with ranks that do not exist; the values mean nothing."""
    with pretend_ranks(world_size, rank=0):
        device = torch.device("cpu")
        topology = Topology.build(ParallelSizes.of(asked.train.accelerator), device)
        assembled = assemble_shards(asked, topology=topology, machine=Machine())
        assembled.model.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*assembled.model.parameters(), *assembled.model.buffers()):
                tensor.zero_()
        keeps = not asked.fsdp.reshard_after_backward
        each = asked.fsdp.sync_each_micro_batch
        with SentBytes() as counted:
            for index in range(micro_batches):
                is_last = index == micro_batches - 1
                set_gradient_sync(assembled.model, is_on=is_last or each)
                set_resharding(assembled.model, is_on=is_last or not keeps)
                batch = packed_batch(lengths, keep=1.0)
                part = split_sequence(batch, layout_of(topology), topology.sequence_rank)
                assembled.forward(part).token_losses.sum().backward()
    return counted.sent


def test_what_does_not_divide_is_told_with_what_comes_of_it():
    text = describe(run(request(), world_size=100))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    row = "model.layers.*.mlp.gate_proj.weight 96 100 96 ranks hold 1, 4 none;"
    assert f"{row} {LAYERS * 4 * HIDDEN} elements of padding travel along" in lines
    row = "lm_head.weight 256 100 85 ranks hold 3, one 1, 14 none;"
    assert f"{row} {44 * HIDDEN:,} elements of padding travel along" in lines


def test_what_divides_is_said_to():
    assert "nothing: every axis divides" in describe(run(request(), world_size=4))


def test_the_tables_hold_the_numbers_in_gib():
    found = run(request(), world_size=4)
    big = replace(found, gradient_bytes=3 * 2**30, moment_bytes=2**29)
    lines = [" ".join(line.split()) for line in describe(big).splitlines()]
    assert "gradients 3.000" in lines
    assert "optimizer state 0.500" in lines
    assert "all three 3.500" in lines
    assert f"qwen3 on rank 0 of 4: {DENSE // 4:,} of {DENSE:,} parameters" in lines


def test_a_world_that_the_sizes_do_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not make up the 6 ranks"):
        run(request(dp_replicate_size=4), world_size=6)


@pytest.fixture
def file(tmp_path: Path) -> str:
    tiny_config("qwen3_moe").save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    mixed = "fsdp_config: {mixed_precision: {enable: false}}"
    path.write_text(
        f"model: {{config_path: {tmp_path / 'model'}}}\n"
        "data: {max_seq_len: 96}\n"
        f"train: {{micro_batch_size: 2, global_batch_size: 64, accelerator: {{{mixed}}}}}\n"
    )
    return str(path)


def test_env_prints_the_mesh_and_then_the_rank_that_is_asked_for(file, capsys):
    assert env.run(["--config", file, "--world-size", "8", "--rehearse", "--rank", "5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sizes of 8 ranks\n")
    assert f"qwen3_moe on rank 5 of 8: {MOE // 8:,} of {MOE:,} parameters" in text
    assert "sent by this rank in a step of 4 x 192 tokens on each of 8 data ranks" in text


def test_env_rehearses_rank_0_where_none_is_named(file, capsys):
    assert env.run(["--config", file, "--world-size", "2", "--rehearse"]) == 0
    assert "on rank 0 of 2" in capsys.readouterr().out


def test_what_training_would_refuse_is_not_rehearsed(file):
    flags = ["--train.optimizer.type", "muon"]
    with pytest.raises(ConfigError, match=r"train\.optimizer\.type"):
        env.run(["--config", file, "--world-size", "2", "--rehearse", *flags])
