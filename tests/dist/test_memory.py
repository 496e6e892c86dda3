"""Where tensors are kept and when gradients travel: every choice trains the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omnilit.config import GradientCheckpointingConfig, OffloadConfig
from omnilit.parallel.copies import Copies
from omnilit.parallel.fsdp import fsdp_modules
from omnilit.parallel.offload import ActivationOffload
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.gradients import compare, gradients_of
from tests.helpers.layouts import DDP, deviation, run_layout
from tests.helpers.models import packed_batch, tiny
from tests.helpers.spread import spread, topology_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 10
REENTRANT = GradientCheckpointingConfig(enable_reentrant=True)


def moving(**over: Any) -> dict[str, Any]:
    return {"accelerator": {"offload_config": OffloadConfig(enable_activation=True, **over)}}


# What changes where tensors are and when, and no number
SAME: dict[str, dict[str, Any]] = {
    "offloaded": {"fsdp": {"offload": True}},
    "offloaded from the CPU": {"fsdp": {"offload": True}, "init_device": "cpu"},
    "sent in pieces": {"fsdp": {"max_load_broadcast_size": 2.0**-17}},
    "moved": moving(),
    "some moved": moving(activation_gpu_limit=2.0**-14),
    "moved, reentrant": {**moving(), "recompute": REENTRANT},
    "all of it": {**moving(), "fsdp": {"offload": True}, "recompute": True},
}
COPIED: dict[str, dict[str, Any]] = {
    "offloaded copies": {"fsdp": {**DDP["fsdp"], "offload": True}},
    "moved beside copies": {**moving(), **DDP},
}
# Sums in another order
CLOSE: dict[str, dict[str, Any]] = {
    "reduced each time": {"fsdp": {"sync_each_micro_batch": True}},
    "reduced each time, kept gathered": {
        "fsdp": {"sync_each_micro_batch": True, "reshard_after_backward": False}
    },
    "reduced each time, offloaded": {"fsdp": {"sync_each_micro_batch": True, "offload": True}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 90)
    return folder


def run_all(folder: Path) -> dict[str, dict[str, Any]]:
    cases = {"plain": {}, "copies": DDP, **SAME, **COPIED, **CLOSE}
    return {
        name: run_layout(folder, name, "model", {"max_steps": STEPS, **over})
        for name, over in cases.items()
    }


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("two")
    return run_ranks(run_all, 2, folder, tmp_path=tmp_path, timeout_s=170)


@pytest.mark.parametrize("name", [*SAME, *COPIED])
def test_where_tensors_are_kept_changes_no_bit_of_ten_steps(name, two_ranks):
    for rank in two_ranks:
        found, expected = rank[name], rank["copies" if name in COPIED else "plain"]
        assert len(found["numbers"]) == STEPS
        assert found["numbers"] == expected["numbers"]
        assert training.is_bit_equal(found["gradients"], expected["gradients"])
        assert training.is_bit_equal(found["last"], expected["last"])
        assert found["held"] == expected["held"]


@pytest.mark.parametrize("name", CLOSE)
def test_gradients_that_are_reduced_each_time_sum_up_to_the_same(name, two_ranks):
    for rank in two_ranks:
        far = deviation(rank[name], rank["plain"])
        assert max(far.loss, far.grad_norm) < 1e-5
        assert far.gradient < 1e-5


class Watched(Copies):
    """Notes the sizes of what leaves, and how often it is memory that a parameter has then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(torch.device("cpu"))
        self.model = model
        self.sizes: list[int] = []
        self.num_parameters = 0

    def send(self, values: Tensor) -> Tensor:
        self.sizes.append(values.nbytes)
        gathered = {p.data_ptr() for p in self.model.parameters() if not isinstance(p, DTensor)}
        self.num_parameters += values.data_ptr() in gathered
        return super().send(values)


FAMILIES = ("qwen3", "qwen3_tied", "qwen3_moe")


def move_activations() -> list[tuple[list[int], int, float]]:
    """What leaves, and how far the gradients are from those of a model that moves nothing."""
    topology, found = topology_of(), []
    batch = packed_batch((40, 24), seed=dist.get_rank())
    for family in FAMILIES:
        plain = tiny(family)
        bound = spread(plain, topology)
        bound.head.forward(plain, batch).token_losses.sum().backward()
        expected = gradients_of(plain)
        for recompute in (False, True):
            model = tiny(family)
            binding = spread(model, topology, recompute=recompute)
            copies = Watched(model)
            offload = ActivationOffload(copies, limit=0)
            offload.watch([unit for unit in fsdp_modules(model) if isinstance(unit, nn.Module)])
            with offload.saving():
                total = binding.head.forward(model, batch).token_losses.sum()
            total.backward()
            far = compare(gradients_of(model), expected, rtol=0).largest
            found.append((copies.sizes, copies.num_parameters, far))
    return found


def test_of_a_recomputed_block_its_input_leaves_and_of_any_block_no_parameter(tmp_path):
    hidden = 64 * 64 * 4  # tokens * width * bytes
    for results in run_ranks(move_activations, 2, tmp_path=tmp_path):
        assert len(results) == 2 * len(FAMILIES)
        assert all(num_parameters == far == 0 for _, num_parameters, far in results)
        sizes = [sizes for sizes, *_ in results]
        for whole, inputs in zip(sizes[::2], sizes[1::2], strict=True):
            assert inputs[:3] == [hidden] * 3  # of both blocks and of the last norm
            assert sum(whole) > 2 * sum(inputs)


def switch(folder: Path) -> dict[str, list[Any]]:
    """Runs that are saved with shards in one place and go on with them in the other."""
    modes = {"device": {}, "host": {"fsdp": {"offload": True}}}
    numbers: dict[str, list[Any]] = {}
    for mode, other in (("device", "host"), ("host", "device")):
        settings = {"max_steps": 4, "checkpoint": {"save_steps": 2}, **modes[mode]}
        numbers[mode] = run_layout(folder, f"from {mode}", "model", settings)["numbers"]
        saved = f"from {mode}/checkpoints/global_step_2"
        found = run_layout(folder, f"to {other}", "model", {"max_steps": 4, **modes[other]}, saved)
        numbers[f"{mode} then {other}"] = found["numbers"]
    return numbers


def test_a_checkpoint_of_offloaded_shards_goes_on_on_the_device_and_the_reverse(folder, tmp_path):
    for numbers in run_ranks(switch, 2, folder, tmp_path=tmp_path, timeout_s=150):
        assert numbers["device"] == numbers["host"]
        for then in ("device then host", "host then device"):
            assert numbers[then] == numbers["device"][2:]
