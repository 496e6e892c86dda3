"""Both optimizers under our clipping, on shards, over skipped steps and through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from omnilit.checkpoint.dcp import load_tensors, named_state, save_tensors
from omnilit.config import MixedPrecisionConfig
from omnilit.errors import ConfigError
from omnilit.modules import SFTModule, assembly
from omnilit.optim.anyprecision import AnyPrecisionAdamW
from omnilit.testing import run_ranks
from omnilit.types import LossTerm, MicroBatch
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ANY = {"type": "anyprecision_adamw"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 40)
    return folder


def full(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All weights and moments, gathered."""
    state = {name: full(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"{name}.{key}"] = full(value)
    return state


# The optimizer alone, sharded


def make(mesh: int | None, seed: int, dtype: torch.dtype) -> tuple[nn.Module, AnyPrecisionAdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)).to(dtype)
    if mesh is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (mesh,)))
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "use_kahan_summation": True}
    return model, AnyPrecisionAdamW(model.parameters(), **settings, fused=True)


def take_steps(model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(num_steps):
        optimizer.zero_grad()
        inputs = torch.arange(6.0).reshape(2, 3) + step  # the same on every rank
        model(inputs.to(dtype)).float().square().mean().backward()
        optimizer.step()


def step_in_shards(num_ranks: int) -> list[dict[str, Tensor]]:
    found = []
    for mesh in (num_ranks, None):
        model, optimizer = make(mesh, 1, torch.bfloat16)
        take_steps(model, optimizer, 3)
        found.append(state_of(model, optimizer))
    return found


def test_shards_step_as_whole_tensors_do(tmp_path):
    for sharded, whole in run_ranks(step_in_shards, 2, 2, tmp_path=tmp_path):
        assert training.is_bit_equal(sharded, whole)
        assert {value.dtype for n, value in sharded.items() if not n.endswith(".step")} == {
            torch.bfloat16
        }


def save(folder: Path) -> dict[str, Tensor]:
    model, optimizer = make(2, 1, torch.bfloat16)
    take_steps(model, optimizer, 3)
    folder.mkdir(exist_ok=True)
    save_tensors(folder, named_state({"model": model}, {"main": optimizer}))
    return state_of(model, optimizer)


def load(folder: Path, num_ranks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = make(num_ranks, 2, torch.bfloat16)
    load_tensors(folder, models={"model": model}, optimizers={"main": optimizer})
    loaded = state_of(model, optimizer)
    take_steps(model, optimizer, 1)
    return loaded, state_of(model, optimizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save, 2, folder / "tensors", tmp_path=folder)[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_ranks_loads_what_two_saved_to_the_bit(saved, num_ranks, tmp_path):
    folder, expected = saved
    ends = []
    for loaded, after in run_ranks(
        load, num_ranks, folder / "tensors", num_ranks, tmp_path=tmp_path
    ):
        assert training.is_bit_equal(loaded, expected)
        dtypes = {name: (loaded[name].dtype, expected[name].dtype) for name in expected}
        assert all(mine == theirs for mine, theirs in dtypes.values())
        assert after["0.weight.step"].item() == 4
        ends.append(after)
    assert all(training.is_bit_equal(end, ends[0]) for end in ends)


# In a run


class Plain(SFTModule):
    """AdamW written out, one parameter after the other."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        found: Any = super().configure_optimizers()
        for group in found["optimizer"].param_groups:
            group.update(fused=False, foreach=False)
        return found


class Watch(Callback):
    """Weights and moments after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.kinds: set[tuple[type, Any]] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SFTModule)
        optimizer = trainer.optimizers[0]
        self.states.append(state_of(pl_module.assembled.model, optimizer))
        self.kinds |= {(type(optimizer), group["fused"]) for group in optimizer.param_groups}


def run_clipped(folder: Path) -> list[tuple[Any, Any, Any]]:
    found = []
    for module_class in (SFTModule, Plain):
        watch = Watch()
        settings = training.arguments(
            folder / "clipped", max_steps=4, optimizer={"max_grad_norm": 0.1, "weight_decay": 0.1}
        )
        log, _ = training.train(folder, settings, module_class=module_class, callbacks=(watch,))
        found.append((training.numbers(log), watch.states[-1], watch.kinds))
    return found


def test_clipped_steps_of_the_fused_kernel_are_those_of_adamw_written_out(folder, tmp_path):
    for fused, plain in run_ranks(run_clipped, 2, folder, tmp_path=tmp_path, timeout_s=150):
        assert fused[2] == {(AdamW, True)}
        assert plain[2] == {(AdamW, False)}
        assert all(norm > 1 for _, _, norm, _ in fused[0])  # every step is clipped, tenfold
        for mine, theirs in zip(fused[0], plain[0], strict=True):
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        for name, value in plain[1].items():  # the same sums in another order
            torch.testing.assert_close(fused[1][name], value, rtol=1e-4, atol=1e-6)


class Diverging(SFTModule):
    """Its loss is infinite in step 2."""

    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        terms = super().loss_terms(batch)
        if self.trainer.global_step == 1:
            terms["lm"] = LossTerm(terms["lm"].sum * float("inf"))
        return terms


def run_diverging(folder: Path, optimizer: dict[str, Any]) -> tuple[list[int], Any]:
    watch = Watch()
    settings = training.arguments(folder / "skipping", max_steps=3, optimizer=optimizer)
    log, _ = training.train(folder, settings, module_class=Diverging, callbacks=(watch,))
    return [result.skipped_steps for result in log.results], watch.states


@pytest.mark.parametrize("optimizer", [{}, ANY], ids=["adamw", "anyprecision_adamw"])
def test_a_skipped_step_touches_neither_weights_nor_moments(folder, optimizer, tmp_path):
    ranks = run_ranks(run_diverging, 2, folder, optimizer, tmp_path=tmp_path, timeout_s=150)
    for skipped, (before, during, after) in ranks:
        assert skipped == [0, 1, 1]
        assert training.is_bit_equal(before, during)
        assert {value.item() for name, value in after.items() if name.endswith(".step")} == {2.0}
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        assert changed == list(after)


def run_anyprecision(folder: Path, out: str, step: int | None) -> tuple[Any, Any, Any]:
    pure = MixedPrecisionConfig(enable=False, master_dtype="bfloat16")
    watch = Watch()
    settings = training.arguments(
        folder / (f"{out}_again" if step else out),
        max_steps=4,
        global_batch_size=2,
        mixed=pure,
        checkpoint={"save_steps": 2},
        optimizer={**ANY, "use_kahan_summation": True},
    )
    path = folder / out / "checkpoints" / f"global_step_{step}" if step else None
    with pytest.MonkeyPatch.context() as patch:
        if step:  # the checkpoint alone brings weights
            patch.delattr(assembly, "load_weights")
        log, _ = training.train(folder, settings, load_path=path, callbacks=(watch,))
    return training.numbers(log), watch.states[-1], watch.kinds


def resume_with_adamw(folder: Path) -> str:
    settings = training.arguments(folder / "other", max_steps=4, global_batch_size=2)
    with pytest.raises(ConfigError) as caught:
        training.train(folder, settings, load_path=folder / "any" / "checkpoints" / "global_step_2")
    return str(caught.value)


def test_a_run_in_pure_bfloat16_goes_on_to_the_bit_and_only_with_its_optimizer(folder, tmp_path):
    whole = run_ranks(run_anyprecision, 2, folder, "any", None, tmp_path=tmp_path, timeout_s=150)
    again = run_ranks(run_anyprecision, 2, folder, "any", 2, tmp_path=tmp_path, timeout_s=150)
    for (numbers, state, kinds), (rest, end, _) in zip(whole, again, strict=True):
        assert kinds == {(AnyPrecisionAdamW, True)}
        assert rest == numbers[2:]
        assert training.is_bit_equal(end, state)
        assert any(name.endswith(".compensation") for name in end)
    (message,) = run_ranks(resume_with_adamw, 1, folder, tmp_path=tmp_path, timeout_s=150)
    assert message == (
        "train.optimizer.type: the checkpoint's moments are those of anyprecision_adamw, not of "
        "adamw. To fix: set type: anyprecision_adamw, or start a new run from the exported weights."
    )
