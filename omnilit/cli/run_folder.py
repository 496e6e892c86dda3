"""The run directory: its lock, its two configuration files, the model's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from typing_extensions import override

from omnilit.callbacks.trainer_view import is_trial_run
from omnilit.checkpoint.layout import (
    MODEL_ASSETS,
    TENSORBOARD,
    check_fresh,
    find_latest,
    holds_run,
    is_own_checkpoint,
    move_later_steps,
    move_run_aside,
)
from omnilit.checkpoint.lock import RunLock
from omnilit.checkpoint.save import saved_step
from omnilit.checkpoint.shard_files import ShardFiles
from omnilit.checkpoint.together import run_together
from omnilit.models.build import load_generation_config
from omnilit.modules import OmniModule


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What goes into the run directory before the first step.

    Args:
        output_dir: `train.checkpoint.output_dir`.
        written: The configuration as given, `${...}` kept.
        resolved: Every field with its value.
        load_path: The checkpoint to go on from. One of `output_dir` makes this the same run,
            which abandons later steps; another one is where a new run starts from.
        is_overwrite: A new run may move those of an earlier run aside.
    """

    output_dir: Path
    written: Mapping[str, Any]
    resolved: Mapping[str, Any]
    load_path: Path | None
    is_overwrite: bool


class RunFolder(Callback):
    """Takes the run directory for this run and writes down what it was asked to do.

    A `fast_dev_run` leaves the directory as it is.

    Args:
        files: What to write.
    """

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self._lock: RunLock | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_trial_run(trainer):
            return
        run_together(
            lambda: self._take(trainer, cast("OmniModule", pl_module), stage),
            name=f"preparing {self.files.output_dir}",
            on_first=True,
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # a checkpoint may still be written into it; the strategy itself is told after the callbacks
        trainer.strategy.on_exception(exception)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take(self, trainer: Trainer, module: OmniModule, stage: str) -> None:
        folder = self.files.output_dir
        self._lock = RunLock(folder)
        self._lock.acquire()
        if stage != "fit":
            return
        self._make_room(trainer)
        _write_config(folder / "config.yaml", self.files.written)
        _write_config(folder / "config.resolved.yaml", self.files.resolved)
        _write_assets(folder / MODEL_ASSETS, module)

    def _make_room(self, trainer: Trainer) -> None:
        """Move aside what a later `auto`, or a reader of curves, would take for this run's."""
        folder, loaded = self.files.output_dir, self.files.load_path
        if loaded is not None and is_own_checkpoint(loaded, folder):
            move_later_steps(folder, step=saved_step(loaded), loaded=loaded)
            return
        # `auto` that found none it can use; with null, the checks before the run have refused it
        may_move = self.files.is_overwrite or (loaded is None and find_latest(folder).path is None)
        check_fresh(folder, overwrite=may_move, load_path=loaded)
        if holds_run(folder):
            _close_curves(trainer, folder / TENSORBOARD)
            move_run_aside(folder)


def _write_assets(folder: Path, module: OmniModule) -> None:
    """What an export of the model holds beside the weights, for one that is made later."""
    module.model_config.save_pretrained(folder)
    (module.processor or module.tokenizer).save_pretrained(folder)
    shards = module.shard_files
    index = shards.path.read_bytes() if isinstance(shards, ShardFiles) else None
    for name in (GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME):
        (folder / name).unlink(missing_ok=True)  # of another model that was here
    if index is not None:
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_bytes(index)
    generation_config = load_generation_config(module.model_path)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def _close_curves(trainer: Trainer, folder: Path) -> None:
    """Close the files that loggers hold in `folder`; they open new ones with their next number.

    Lightning opens all loggers before it calls the first hook of a callback.
    """
    own = folder.resolve()
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        if Path(logger.log_dir).resolve().is_relative_to(own):
            logger.experiment.close()


def _write_config(path: Path, tree: Mapping[str, Any]) -> None:
    """Write `tree` as YAML; another one that stands there moves to `<name>.<k>`."""
    text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        number = 1
        while (aside := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(aside)
    path.write_text(text, encoding="utf-8")
