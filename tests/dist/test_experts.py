"""Experts spread over ranks: the gradients, norms and steps of one process."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omnilit.config import OpsImplementationConfig
from omnilit.kernels import moe
from omnilit.models.places import is_experts
from omnilit.parallel.grad_norm import clip_gradients, group_norms, total_norm
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.testing import run_ranks
from tests.helpers.experts import alone, batches, summed, train_once
from tests.helpers.gradients import Deviation, compare, gradients_of
from tests.helpers.models import tiny
from tests.helpers.spread import CPU, spread

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
INSIDE, OUTSIDE = ParallelSizes(ep_size=2), ParallelSizes(ep_size=2, ep_outside=True)
COPIES = ParallelSizes(dp_replicate_size=2, ep_size=2)
EP_4 = ParallelSizes(ep_size=4)
# Ranks of a sequence hold tokens of their own like any other, those of a matrix hold the same
SEQUENCE, MATRIX = ParallelSizes(ulysses_size=2, ep_size=4), ParallelSizes(tp_size=2, ep_size=2)
# Family, sizes, and what is special about it
CASES: dict[str, tuple[str, ParallelSizes, frozenset[str]]] = {
    "qwen3_moe ep4": ("qwen3_moe", EP_4, frozenset()),
    "qwen3_moe ep4 with a kernel of ours": ("qwen3_moe", EP_4, frozenset({"kernel"})),
    "qwen3_moe efsdp2 x ep2": ("qwen3_moe", INSIDE, frozenset({"recomputed"})),
    "qwen3_moe ep2 x efsdp2": ("qwen3_moe", OUTSIDE, frozenset()),
    "qwen3_moe without a token for half of them": ("qwen3_moe", INSIDE, frozenset({"forced"})),
    "deepseek_v3 2 copies x ep2": ("deepseek_v3", COPIES, frozenset()),
    "deepseek_v3 ep2 x efsdp2": ("deepseek_v3", OUTSIDE, frozenset({"recomputed"})),
    "gpt_oss efsdp2 x ep2": ("gpt_oss", INSIDE, frozenset()),
    "gpt_oss ep4": ("gpt_oss", EP_4, frozenset({"recomputed"})),
    "qwen3_moe ep4 across the ranks of a sequence": ("qwen3_moe", SEQUENCE, frozenset()),
    "qwen3_moe ep2 across the ranks of a matrix": ("qwen3_moe", MATRIX, frozenset()),
}
PER_RANK = 2  # micro-batches, reduced after the last


def to_the_upper_half(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
    """Sends each token to experts 4 to 7, so that whoever holds the others gets none."""
    logits, weights, index = output
    return logits, weights, index % 4 + 4


def build(family: str, special: frozenset[str]) -> Any:
    model = tiny(family)
    if "forced" in special:
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(to_the_upper_half)
    return model


def run_case(family: str, sizes: ParallelSizes, special: frozenset[str]) -> dict[str, Any]:
    one, model = build(family, special), build(family, special)
    calls: list[int] = []

    def kernel(*args: Any) -> Tensor:
        calls.append(1)
        return moe.eager(*args)

    ops = OpsImplementationConfig()
    if "kernel" in special:
        ops = OpsImplementationConfig(moe_implementation="eager")  # which leaves what is there
        for module in filter(is_experts, model.modules()):
            module.forward = MethodType(kernel, module)
    topology = Topology.build(sizes, CPU)
    binding = spread(model, topology, ops=ops, recompute="recomputed" in special)
    number = topology.loss.size() * PER_RANK
    expected_loss, expected = alone(one, number)
    parts = batches(number)
    num_targets = sum(batch.counts["tokens"] for batch in parts)
    mine = parts[topology.loss.get_local_rank() * PER_RANK :][:PER_RANK]
    loss = summed(train_once(model, binding, mine, num_targets), topology)
    found = gradients_of(model)
    names = [n for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj")]
    weight = model.get_parameter(names[-1])
    assert isinstance(weight, DTensor)
    unused = max(float(expected[name][:4].abs().max()) for name in names)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]))
    by_module = group_norms({n: [p] for n, p in model.named_parameters()})
    return {
        "loss": abs(loss / expected_loss - 1),
        "gradients": compare(found, expected),
        "norm": abs(float(total_norm(model.parameters())) / norm - 1),
        "parts": sum(part**2 for part in by_module.values()) / norm**2 - 1,
        "clipped": clip(model, norm / 2),
        "placements": str(weight.placements),
        "local": tuple(weight.to_local().shape),
        "unused": unused,
        "calls": len(calls),
    }


def clip(model: nn.Module, limit: float) -> float:
    clip_gradients(model.parameters(), limit)
    return float(total_norm(model.parameters())) / limit - 1


def run_cases() -> dict[str, dict[str, Any]]:
    return {name: run_case(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(run_cases, 4, tmp_path=tmp_path_factory.mktemp("four"), timeout_s=150)


@pytest.mark.parametrize("name", CASES)
def test_four_ranks_have_the_gradients_of_one_process(name, four_ranks):
    for rank in four_ranks:
        found = rank[name]
        assert found["loss"] < 1e-6
        assert isinstance(found["gradients"], Deviation)
        assert found["gradients"].largest < 5e-6
        assert found["gradients"].num_tensors > 20
        for of_norm in ("norm", "parts", "clipped"):
            assert abs(found[of_norm]) < 1e-5, of_norm


def test_each_rank_holds_its_part_of_the_experts(four_ranks):
    whole = (8, 64, 64)
    for name, local, placements in (
        ("qwen3_moe ep4", (2, 64, 64), "(Shard(dim=1), Shard(dim=0))"),
        ("qwen3_moe efsdp2 x ep2", (4, 32, 64), "(Shard(dim=1), Shard(dim=0))"),
        ("deepseek_v3 2 copies x ep2", (4, 64, 64), "(Replicate(), Shard(dim=1), Shard(dim=0))"),
    ):
        assert four_ranks[0][name]["local"] == local != whole
        assert four_ranks[0][name]["placements"] == placements


def test_experts_compute_with_what_was_bound_before_they_were_spread(four_ranks):
    name = "qwen3_moe ep4 with a kernel of ours"
    assert [rank[name]["calls"] for rank in four_ranks] == [2 * PER_RANK] * 4  # of two layers


def test_half_of_the_experts_really_got_no_token(four_ranks):
    forced = four_ranks[0]["qwen3_moe without a token for half of them"]
    assert forced["unused"] == 0.0
    assert four_ranks[0]["qwen3_moe ep4"]["unused"] > 0.0
