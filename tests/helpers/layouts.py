"""The same training on several layouts of ranks, and how far their numbers lie apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from omnilit.modules import OmniModule
from omnilit.types import IGNORE, MicroBatch
from tests.helpers import training
from tests.helpers.gradients import compare, gradients_of

DDP: dict[str, Any] = {"fsdp": {"fsdp_mode": "ddp"}}


@dataclass(frozen=True)
class Layout:
    """How many ranks share the model, and in which way.

    Args:
        name: For the table.
        num_ranks: Processes.
        over: What `training.arguments` takes for it.
        model: Further arguments of the module.
    """

    name: str
    num_ranks: int
    over: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


ALONE = Layout("one process", 1)
FSDP = Layout("FSDP 2", 2)
DDP_2 = Layout("DDP 2", 2, DDP)
HSDP = Layout("HSDP 2x2", 4, {"accelerator": {"dp_replicate_size": 2}})
OTHERS = (
    Layout("DDP 1", 1, DDP),
    Layout("HSDP 1x1", 1, {"accelerator": {"dp_replicate_size": 1, "dp_shard_size": 1}}),
    Layout("DDP 4", 4, DDP),
    Layout("FSDP 4", 4),
    Layout("HSDP 4x1", 4, {"accelerator": {"dp_shard_size": 1}}),
    Layout("HSDP 2x1", 2, {"accelerator": {"dp_replicate_size": 2, "dp_shard_size": 1}}),
)


class Watcher(training.StepLog):
    """Also keeps the first step's gradients, digests of what this rank holds, and label counts.

    Args:
        gradients: Whole and of every pipeline stage, by name.
        held: Of the parameters here, before and after training.
        labels: Supervised tokens that this rank saw of each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, Tensor] = {}
        self.held: list[str] = []
        self.labels: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, OmniModule)
        self.held.append(digest(pl_module.assembled.model))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, OmniModule)
        if self.gradients:
            return
        self.gradients = join_stages(pl_module, gradients_of(pl_module.assembled.model))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for one in micro_batches(batch):
            if one.stamp is None or one.stamp.index == 0:
                self.labels.append(0)
            self.labels[-1] += int((one.labels != IGNORE).sum())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, OmniModule)
        self.held.append(digest(pl_module.assembled.model))


def micro_batches(batch: Any) -> Iterator[MicroBatch]:
    """Those of what Lightning calls a batch: one, or under pipeline parallelism a whole step's."""
    if isinstance(batch, MicroBatch):
        yield batch
    else:
        for part in batch:
            yield from micro_batches(part)


def join_stages(module: OmniModule, own: dict[str, Any]) -> dict[str, Any]:
    """What the ranks of one pipeline hold under different names, in one dict; every rank calls.

    Raises:
        AssertionError: Two stages hold the same name.
    """
    group = module.topology.pp
    if group.size() == 1:
        return own
    parts: list[dict[str, Any]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, own, group=group.get_group())
    joined = {name: value for part in parts for name, value in part.items()}
    assert len(joined) == sum(map(len, parts)), "two stages hold the same name"
    return joined


def digest(model: nn.Module) -> str:
    """What this rank holds of the parameters, to the bit."""
    found = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found.update(local.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run_layout(
    folder: Path, out: str, model: str, over: dict[str, Any], resume: str | None = None
) -> dict[str, Any]:
    """Train on this rank of however many there are.

    Args:
        folder: From `training.write_model` and `write_conversations`.
        out: Name of the run's folder.
        model: Name of the model's folder.
        over: Fields of `train`; see `training.arguments`.
        resume: A checkpoint to go on from, below `folder`.
    """
    watcher = Watcher()
    settings = {"global_batch_size": 8, **over}
    _, module = training.train(
        folder,
        training.arguments(folder / out, **settings),
        model={"config_path": str(folder / model)},
        load_path=folder / resume if resume else None,
        callbacks=(watcher,),
    )
    return {
        "numbers": training.numbers(watcher),
        "first": watcher.first_weights,
        "gradients": watcher.gradients,
        "held": watcher.held,
        "labels": watcher.labels,
        "last": training.weights_of(module),
        "is_hf": type(module.assembled.model).__mro__[2].__module__.startswith("transformers."),
    }


@dataclass(frozen=True)
class Deviation:
    """The largest differences of a run from another one.

    Args:
        loss: Relative, over all steps.
        grad_norm: Relative, over all steps.
        gradient: Of an entry of the first step's gradients, relative to its tensor's largest.
        bias: Mean of the losses' relative differences with their signs.
    """

    loss: float
    grad_norm: float
    gradient: float
    bias: float


def deviation(found: dict[str, Any], expected: dict[str, Any]) -> Deviation:
    """How far one run lies from another.

    Raises:
        AssertionError: They have other steps, tokens or parameters, or a number is not finite.
    """
    mine, theirs = found["numbers"], expected["numbers"]
    assert theirs, "nothing to compare with"
    assert all(math.isfinite(number) for row in (*mine, *theirs) for number in row), "not finite"
    is_same = [(row[0], row[3]) for row in mine] == [(row[0], row[3]) for row in theirs]
    assert is_same, "other steps or tokens"
    losses = _relative([row[1] for row in mine], [row[1] for row in theirs])
    norms = _relative([row[2] for row in mine], [row[2] for row in theirs])
    gradients = compare(found["gradients"], expected["gradients"], rtol=float("inf"))
    return Deviation(
        max(map(abs, losses)), max(map(abs, norms)), gradients.largest, sum(losses) / len(losses)
    )


def _relative(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [one / other - 1 for one, other in zip(found, expected, strict=True)]
