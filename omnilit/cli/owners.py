"""Who owns a setting: `train.*` or Lightning's `trainer.*`, never both; and its type there."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from typing import Final

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from omnilit.errors import Problem, suggest

KEPT: Final = (
    "accelerator",
    "devices",
    "num_nodes",
    "logger",
    "callbacks",
    "limit_val_batches",
    "fast_dev_run",
    "enable_progress_bar",
    "inference_mode",
    "plugins",
)

MOVED: Final = {
    "strategy": "train.accelerator",
    "precision": "train.accelerator.fsdp_config.mixed_precision",
    "max_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "accumulate_grad_batches": "train.global_batch_size",
    "gradient_clip_val": "train.optimizer.max_grad_norm",
    "gradient_clip_algorithm": "train.optimizer.max_grad_norm",
    "limit_train_batches": "train.max_steps",
    "val_check_interval": "train.eval_steps",
    "check_val_every_n_epoch": "train.eval_epochs",
    "num_sanity_val_steps": "train.eval_steps",
    "use_distributed_sampler": "train.accelerator",
    "enable_checkpointing": "train.checkpoint.save_steps",
    "default_root_dir": "train.checkpoint.output_dir",
    "deterministic": "train.enable_full_determinism",
    "profiler": "train.profile",
    "reload_dataloaders_every_n_epochs": "train.num_train_epochs",
    "sync_batchnorm": "train.accelerator",
    "log_every_n_steps": "train.wandb",
}

ROOT_MOVED: Final = {
    "seed_everything": "train.seed",
    "ckpt_path": "train.checkpoint.load_path",
    "optimizer": "train.optimizer",
    "lr_scheduler": "train.optimizer.lr_decay_style",
}


def check_trainer_keys(given: Iterable[str]) -> list[Problem]:
    """A problem for each key under `trainer` that is not Lightning's to decide here."""
    problems = []
    for name in given:
        if name in KEPT:
            continue
        if name in MOVED:
            problems.append(
                Problem(
                    f"trainer.{name}", f"belongs to {MOVED[name]}", f"set {MOVED[name]} instead"
                )
            )
        else:
            problems.append(
                Problem(
                    f"trainer.{name}",
                    f"is not a setting of this program.{suggest(name, (*KEPT, *MOVED))}",
                    f"use one of {', '.join(KEPT)}",
                )
            )
    return problems


def check_trainer_types(given: Mapping[str, object], *, wrong: Collection[str]) -> list[Problem]:
    """A problem for each key under `trainer` whose value Lightning does not take.

    Args:
        given: The keys of the group.
        wrong: Paths that have a problem already; the keys around them are left out.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    problems = []
    for name, value in given.items():
        key = f"trainer.{name}"
        if any(path == key or path.startswith(f"{key}.") for path in wrong):
            continue
        try:
            parser.parse_object({"trainer": {name: deepcopy(value)}})  # it writes into them
        except (ArgumentError, ValueError, TypeError, KeyError) as error:
            text = " ".join(str(error).split()).removeprefix(f'Parser key "{key}": ')
            problems.append(Problem(key, text, "see `omnilit fit --help trainer`"))
    return problems
