"""Whole models with the kernels of a GPU, beside the same with eager ones."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.helpers.interpreted  # noqa: F401 - before anything that imports triton
from omnilit.config import OpsImplementationConfig
from omnilit.kernels import MOE as MOE_SLOT
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, changed_fields, resolve_kernels
from omnilit.models.bind import bind_kernels
from omnilit.models.places import is_experts
from omnilit.testing import run_ranks
from tests.helpers.experts import alone, batches, summed, train_once
from tests.helpers.gradients import Deviation, compare, gradients_of
from tests.helpers.models import packed_batch, tiny
from tests.helpers.spread import spread, topology_of

HOPPER = Machine("cuda", sm=90, packages={"liger-kernel": "0.8", "triton": "3.9"})
OURS = OpsImplementationConfig(
    rms_norm_implementation="triton", rotary_pos_emb_implementation="triton"
)
LIGER = OpsImplementationConfig()  # and our own experts and balance loss


def kernels_of(ops: OpsImplementationConfig) -> KernelSet:
    return resolve_kernels(ops, given=changed_fields(ops), machine=HOPPER)


def run(family: str, ops: OpsImplementationConfig, **over: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model, batch = tiny(family, **over), packed_batch((9, 4), seed=0)
    binding = bind_kernels(model, kernels_of(ops))
    output = binding.forward(model, batch)
    loss = output.token_losses.sum()
    if output.balance is not None:
        loss = loss + output.balance
    loss.backward()
    binding.verify_called()
    return loss.detach(), gradients_of(model)


MOE = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "num_hidden_layers": 1}
# GPT-OSS has a rotary function and a gate of its own: only the norms and experts have a place
PLACES = OpsImplementationConfig(rms_norm_implementation="triton")


@pytest.mark.parametrize(
    ("family", "ops", "over"),
    [
        ("qwen3_moe", LIGER, MOE),
        pytest.param("qwen3_moe", OURS, MOE, marks=pytest.mark.slow),
        pytest.param("gpt_oss", PLACES, {}, marks=pytest.mark.slow),
        pytest.param("gemma3", OURS, {}, marks=pytest.mark.slow),
        pytest.param("gemma3", LIGER, {}, marks=pytest.mark.slow),
    ],
)
def test_a_packed_model_has_the_loss_and_gradients_of_the_eager_one(family, ops, over):
    loss, grads = run(family, ops, **over)
    expected, references = run(family, OpsImplementationConfig(preset="eager"), **over)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == references.keys()
    for name, grad in grads.items():
        scale = references[name].abs().max()
        assert (grad - references[name]).abs().max() <= 1e-5 * max(scale, 1e-2), name


def to_the_first_two(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
    """Leaves one of two ranks without a token."""
    logits, weights, index = output
    return logits, weights, index % 2


def spread_over_two(is_forced: bool) -> tuple[int, float, Deviation]:
    one, model = tiny("qwen3_moe"), tiny("qwen3_moe")
    routers = [m for x in (one, model) for m in x.modules() if "TopKRouter" in type(m).__name__]
    for router in routers if is_forced else ():
        router.register_forward_hook(to_the_first_two)
    calls: list[int] = []

    def kernel(self: nn.Module, *args: Tensor) -> Tensor:
        calls.append(self.num_experts)  # type: ignore[arg-type]
        return MOE_SLOT.resolve("fused_triton", HOPPER)(self, *args)

    for module in filter(is_experts, model.modules()):
        module.forward = MethodType(kernel, module)
    topology = topology_of(ep_size=2)
    eager = OpsImplementationConfig(moe_implementation="eager")  # which leaves what is there
    binding = spread(model, topology, ops=eager, recompute=True)
    expected_loss, expected = alone(one, 2)
    parts = batches(2)
    num_targets = sum(batch.counts["tokens"] for batch in parts)
    mine = parts[topology.loss.get_local_rank() :][:1]
    loss = summed(train_once(model, binding, mine, num_targets), topology)
    assert set(calls) == {4}, "each rank holds half of the eight experts"
    return len(calls), abs(loss / expected_loss - 1), compare(gradients_of(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("is_forced", [False, True])
def test_experts_spread_over_ranks_and_sharded_have_the_gradients_of_one_process(
    is_forced, tmp_path
):
    for calls, loss, gradients in run_ranks(spread_over_two, 2, is_forced, tmp_path=tmp_path):
        assert calls == 4  # two layers, and once more in backward
        assert loss <= 1e-6
        assert gradients.largest <= 1e-5
