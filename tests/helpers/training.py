"""A whole training run in this process, small enough for a test."""

from __future__ import annotations

import functools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.distributed import ProcessGroup

from omnilit.callbacks import (
    CheckpointSaver,
    EvalSamples,
    EvaluationSchedule,
    MetricsRecorder,
)
from omnilit.config import (
    AcceleratorConfig,
    CheckpointConfig,
    DataloaderConfig,
    FSDPConfig,
    GradientCheckpointingConfig,
    MixedPrecisionConfig,
    OptimizerConfig,
    TrainingArguments,
)
from omnilit.modules import OmniDataModule, OmniModule, SFTModule
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.strategies import OmniStrategy
from omnilit.types import StepResult
from tests.helpers.models import tiny_config
from tests.helpers.tokenizers import build_tokenizer

BUILD = Topology.build
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs")


def write_model(folder: Path, family: str = "qwen3", **over: Any) -> Path:
    """A folder with the configuration of a tiny model and a tokenizer that fits it."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    config = tiny_config(family, **{"vocab_size": len(tokenizer), **over})
    config.save_pretrained(folder)
    return folder


def write_conversations(file: Path, number: int, *, seed: int = 0) -> Path:
    """Conversations of very different lengths."""
    draw = random.Random(seed)
    with file.open("w") as lines:
        for _ in range(number):
            messages = [
                {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))}
                for _ in range(draw.randint(1, 2))
                for role in ("user", "assistant")
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


def arguments(out: Path, **over: Any) -> TrainingArguments:
    """fp32, no recomputation, a large eps so that equal gradients give equal weights.

    Args:
        out: The run's folder.
        over: Fields of the `train` group; those of `checkpoint`, `optimizer`, `accelerator` and
            `fsdp` (its `fsdp_config`) as dicts, `mixed` its mixed precision, and `recompute` on or
            off, or a whole `gradient_checkpointing`.
    """
    nothing = {"save_epochs": 0, "save_hf_weights": False}
    checkpoint = CheckpointConfig(output_dir=str(out), **nothing | over.pop("checkpoint", {}))
    mixed = over.pop("mixed", MixedPrecisionConfig(enable=False))
    optimizer = {"lr": 1e-2, "eps": 1e-4, "max_grad_norm": 1.0, **over.pop("optimizer", {})}
    fsdp = FSDPConfig(mixed_precision=mixed, **over.pop("fsdp", {}))
    recompute = over.pop("recompute", False)
    if isinstance(recompute, bool):
        recompute = GradientCheckpointingConfig(enable=recompute)
    return TrainingArguments(
        accelerator=AcceleratorConfig(fsdp_config=fsdp, **over.pop("accelerator", {})),
        gradient_checkpointing=recompute,
        checkpoint=checkpoint,
        optimizer=OptimizerConfig(**optimizer),
        **over,
    )


class StepLog(Callback):
    """Keeps every step's result."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.first_weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, OmniModule)
        gathered = pl_module.assembled.gather_weights()
        self.first_weights = {name: tensor.clone() for name, tensor in gathered.items()}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, OmniModule)
        result = pl_module.step_result
        if result is not None and (not self.results or self.results[-1].step != result.step):
            self.results.append(result)


def train(
    folder: Path,
    train: TrainingArguments,
    *,
    module_class: type[OmniModule] = SFTModule,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    load_path: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    loggers: tuple[Logger, ...] = (),
    is_validation: bool = False,
) -> tuple[StepLog, OmniModule]:
    """Run `fit` on this rank of however many there are.

    Args:
        folder: With `model/`, `train.jsonl` and, where evaluated, `eval.jsonl`.
        train: The `train` group.
        module_class: The task.
        model: Further arguments of the module.
        data: Further arguments of the data module.
        load_path: A checkpoint to go on from.
        callbacks: Further ones.
        loggers: None but these.
        is_validation: Run `validate` in its place.
    """
    os.environ["OMNILIT_CACHE"] = str(folder / "cache")
    module = module_class(**{"config_path": str(folder / "model"), **(model or {})}, train=train)
    loader: dict[str, Any] = {
        "train_path": str(folder / "train.jsonl"),
        "max_seq_len": 64,
        # in a rank, which a fork server started, each worker would import torch anew
        "dataloader": DataloaderConfig(num_workers=0),
        **(data or {}),
    }
    datamodule = OmniDataModule(**loader, train=train)
    log, output_dir = StepLog(), Path(train.checkpoint.output_dir)
    own = (
        log,
        *([EvalSamples(train, output_dir)] if train.eval_samples else []),
        MetricsRecorder(output_dir),
        *callbacks,
        EvaluationSchedule(eval_steps=train.eval_steps, eval_epochs=train.eval_epochs),
        CheckpointSaver(train.checkpoint),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=OmniStrategy(train.accelerator),
        max_epochs=train.num_train_epochs,
        callbacks=list(own),
        logger=list(loggers),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        inference_mode=False,
        # as on the command line: what EvaluationSchedule decides can be any step
        val_check_interval=1 if loader.get("eval_path") else 1.0,
        check_val_every_n_epoch=None if loader.get("eval_path") else 1,
        default_root_dir=output_dir,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "build", _build_once)
        trainer.ckpt_path = load_path  # as the command line does it
        if is_validation:
            trainer.validate(module, datamodule=datamodule, verbose=False)
        else:
            trainer.fit(module, datamodule=datamodule)
    return log, module


def _build_once(sizes: ParallelSizes, device: torch.device) -> Topology:
    """The meshes of a layout, made by the first of a process's runs that has it.

    Each group of gloo has threads of its own that look for work a hundred times a second: those of
    dozens of runs would take a core from the one that runs.
    """
    return _build(sizes, device, dist.group.WORLD)


@functools.cache
def _build(sizes: ParallelSizes, device: torch.device, world: ProcessGroup | None) -> Topology:
    return BUILD(sizes, device)


def weights_of(module: OmniModule) -> dict[str, Tensor]:
    """The full weights on rank 0."""
    return {n: t.clone() for n, t in module.assembled.gather_weights().items()}


def numbers(log: StepLog) -> list[tuple[int, float, float, int]]:
    """Step, loss, gradient norm and supervised tokens of every step."""
    return [(r.step, r.loss, r.grad_norm, r.tokens) for r in log.results]


def is_bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
