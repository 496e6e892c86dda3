"""Values and steps of experts that are spread: to the bit what one process has, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from omnilit.config import OptimizerConfig
from omnilit.errors import ConfigError
from omnilit.kernels import load_balancing
from omnilit.kernels.machine import Machine
from omnilit.models import places
from omnilit.models.blocks import decoder_blocks
from omnilit.models.build import build_meta
from omnilit.models.compilation import compile_blocks
from omnilit.models.experts import spread_experts
from omnilit.models.weights import Delivery, gather_weights, initial_tensors, load_weights
from omnilit.optim.build import build_optimizer
from omnilit.parallel.materialize import named_tensors
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.testing import run_ranks
from tests.helpers.experts import alone, batches, train_once
from tests.helpers.gradients import compare, gradients_of
from tests.helpers.models import tiny, tiny_config
from tests.helpers.spread import CPU, spread

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
INSIDE, OUTSIDE = ParallelSizes(ep_size=2), ParallelSizes(ep_size=2, ep_outside=True)
COPIES = ParallelSizes(dp_replicate_size=2, ep_size=2)
# Nothing but the number of experts can be divided, and that unevenly: shards within shards
ODD: dict[str, Any] = {"hidden_size": 63, "moe_intermediate_size": 33, "num_experts": 6}
FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "gpt_oss": {}}


def held(family: str, sizes: ParallelSizes, over: dict[str, Any], **how: Any) -> dict[str, Tensor]:
    """The whole values of a model that was built on the meta device, spread and filled."""
    config = tiny_config(family, **over)
    model = build_meta(config, dtype=torch.float32)
    spread(model, Topology.build(sizes, CPU))
    load_weights(model, config, device=CPU, seed=5, **how)
    return gather_weights(model)


def check_values(folder: Path) -> int:
    """Compares on rank 0, where gathered values are; returns how many tensors."""
    num_compared = 0
    for family, over in FAMILIES.items():
        path = str(folder / family)
        trained = named_tensors(tiny(family, **over))
        drawn = dict(initial_tensors(build_meta(tiny_config(family), dtype=torch.float32), seed=5))
        for sizes in (OUTSIDE, COPIES):
            for delivery in (Delivery(max_bytes=10_000), Delivery(from_rank0=False)):
                for source, expected in ((None, drawn), (path, trained)):
                    found = held(family, sizes, over, path=source, delivery=delivery)
                    assert all(torch.equal(t, expected[n]) for n, t in found.items()), family
                    num_compared += len(found)
    odd = dict(
        initial_tensors(build_meta(tiny_config("qwen3_moe", **ODD), dtype=torch.float32), seed=5)
    )
    found = held("qwen3_moe", INSIDE, ODD, path=None)
    assert all(torch.equal(tensor, odd[name]) for name, tensor in found.items())
    return num_compared + len(found)


def adamw(model: PreTrainedModel, kind: str) -> Optimizer:
    return build_optimizer(model, OptimizerConfig(type=cast("Any", kind), eps=1e-3, lr=1e-2))


OPTIMIZERS: dict[str, Callable[[PreTrainedModel], Optimizer]] = {
    "fused": partial(adamw, kind="adamw"),
    "anyprecision": partial(adamw, kind="anyprecision_adamw"),
    "over lists": lambda model: AdamW(model.parameters(), lr=1e-2, eps=1e-3, foreach=True),
}


def check_steps() -> dict[str, float]:
    """The largest deviation of a weight after two steps, by optimizer; of odd sizes as well."""
    number = dist.get_world_size()
    parts = batches(number)
    num_targets = sum(batch.counts["tokens"] for batch in parts)
    found: dict[str, float] = {}
    for name, make in OPTIMIZERS.items():
        over = ODD if name == "fused" else {}
        one, model = tiny("qwen3_moe", **over), tiny("qwen3_moe", **over)
        topology = Topology.build(OUTSIDE, CPU)
        binding = spread(model, topology)
        optimizers = make(one), make(model)
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            expected = alone(one, number)[1]
            train_once(model, binding, parts[topology.data_rank :][:1], num_targets)
            compare(gradients_of(model), expected, rtol=1e-2)  # weights differ a little by now
            for optimizer in optimizers:
                optimizer.step()
        whole = {n: full(p) for n, p in model.named_parameters()}
        found[name] = compare(whole, {n: full(p) for n, p in one.named_parameters()}).largest
    return found


def full(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def breaks_when_experts_are_averaged() -> str:
    """What the comparator says of experts' gradients that are means over their shards' ranks."""
    parts, model = batches(dist.get_world_size()), tiny("qwen3_moe")
    expected = alone(tiny("qwen3_moe"), len(parts))[1]
    topology = Topology.build(INSIDE, CPU)
    binding = spread(model, topology)
    for module in model.modules():
        if places.is_experts(module):
            cast("FSDPModule", module).set_gradient_divide_factor(2.0)
    num_targets = sum(batch.counts["tokens"] for batch in parts)
    train_once(model, binding, parts[topology.data_rank :][:1], num_targets)
    with pytest.raises(AssertionError) as caught:
        compare(gradients_of(model), expected)
    return str(caught.value)


def refusal_without_a_plan() -> str:
    topology = Topology.build(INSIDE, CPU)
    assert topology.sparse is not None
    model = build_meta(tiny_config("qwen3"), dtype=torch.float32)
    with pytest.raises(ConfigError) as caught:
        spread_experts(model, ep_mesh=topology.sparse["ep"], tp_mesh=topology.tp)
    return str(caught.value)


def is_left_out_of_compiled_blocks() -> bool:
    model = tiny("qwen3_moe")
    topology = Topology.build(INSIDE, CPU)
    assert topology.sparse is not None
    experts = spread_experts(model, ep_mesh=topology.sparse["ep"], tp_mesh=topology.tp)
    compile_blocks(decoder_blocks(model), Machine.detect("cpu"))
    reasons = [getattr(module.forward, "_torchdynamo_disable_msg", None) for module in experts]
    return all(reasons) and all(getattr(m.forward, "__self__") is m for m in experts)  # noqa: B009


def work(folder: str) -> dict[str, Any]:
    return {
        "values": check_values(Path(folder)),
        "steps": check_steps(),
        "broken": breaks_when_experts_are_averaged(),
        "no plan": refusal_without_a_plan(),
        "compiled": is_left_out_of_compiled_blocks(),
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("weights")
    for family, over in FAMILIES.items():
        tiny(family, **over).save_pretrained(folder / family, max_shard_size="60KB")
    return run_ranks(work, 4, str(folder), tmp_path=folder, timeout_s=150)[0]


def test_drawn_and_loaded_values_are_those_of_one_process_to_the_bit(first):
    assert first["values"] > 400


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_over_both_meshes(name, first):
    assert first["steps"][name] < 1e-4


def test_experts_averaged_over_ranks_do_not_pass_for_right(first):
    assert "4 of 25 tensors are off" in first["broken"]
    assert "experts.down_proj 5.0e-01" in first["broken"]


def test_a_model_without_a_plan_is_refused(first):
    assert first["no plan"].startswith(
        "train.accelerator.ep_size: transformers has no expert-parallel plan for 'qwen3'. To fix: "
    )


def test_experts_stay_out_of_compiled_blocks(first):
    assert first["compiled"]


def balance_shares() -> tuple[float, Tensor]:
    """Each rank holds its half of the tokens of one micro-batch, one half with padding."""
    rank, logits = dist.get_rank(), whole_logits()
    half = [layer[:5] if rank == 0 else layer[5:] for layer in logits]
    half = [layer.detach().requires_grad_() for layer in half]
    is_real = None if rank == 0 else torch.tensor([True, True, True, False])
    group = dist.group.WORLD
    sums = load_balancing.eager(half, num_experts=6, top_k=2, is_real=is_real)
    share = load_balancing.of_sums(sums, num_experts=6, group=group)
    share.backward()
    return share.item(), torch.stack([cast("Tensor", layer.grad) for layer in half])


def balance_loss(logits: list[Tensor], is_real: Tensor | None = None) -> Tensor:
    sums = load_balancing.eager(logits, num_experts=6, top_k=2, is_real=is_real)
    return load_balancing.of_sums(sums, num_experts=6)


def whole_logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(9, 6, generator=generator) for _ in range(2)]


def test_halves_of_a_micro_batch_share_its_balance_loss_and_gradient(tmp_path):
    whole = [layer.requires_grad_() for layer in whole_logits()]
    is_real = torch.arange(9) < 8
    loss = balance_loss(whole, is_real)
    loss.backward()
    (one, of_one), (other, of_other) = run_ranks(balance_shares, 2, tmp_path=tmp_path)
    assert one + other == pytest.approx(loss.item(), rel=1e-6)
    found = torch.cat([of_one, of_other], dim=1)
    torch.testing.assert_close(found, torch.stack([cast("Tensor", w.grad) for w in whole]))
    halves = [[layer[:5] for layer in whole], [layer[5:8] for layer in whole]]
    mean = sum(balance_loss(half).item() for half in halves) / 2
    assert abs(mean - loss.item()) > 0.01, "a mean of halves would do as well"
