"""The run directory: its lock, its two configuration files, the model's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from omnilit.checkpoint.layout import check_fresh
from omnilit.checkpoint.lock import RunLock
from omnilit.errors import CheckpointError, OmniError
from omnilit.modules import OmniModule
from omnilit.parallel.collectives import raise_together


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What goes into the run directory before the first step.

    Args:
        output_dir: `train.checkpoint.output_dir`.
        written: The configuration as given, `${...}` kept.
        resolved: Every field with its value.
        is_resume: Go on with the checkpoints that are there.
        is_overwrite: Move those of an earlier run aside.
    """

    output_dir: Path
    written: Mapping[str, Any]
    resolved: Mapping[str, Any]
    is_resume: bool
    is_overwrite: bool


class RunFolder(Callback):
    """Takes the run directory for this run and writes down what it was asked to do.

    Args:
        files: What to write.
    """

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self._lock: RunLock | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        error: BaseException | None = None
        if trainer.is_global_zero:
            try:
                self._take(cast("OmniModule", pl_module), stage)
            except OmniError as caught:
                error = caught
            except OSError as caught:
                error = CheckpointError(f"{self.files.output_dir} cannot be written: {caught}")
        raise_together(error)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take(self, module: OmniModule, stage: str) -> None:
        folder = self.files.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(folder)
        self._lock.acquire()
        if stage != "fit":
            return
        if not self.files.is_resume:
            check_fresh(folder, overwrite=self.files.is_overwrite)
        _write_config(folder / "config.yaml", self.files.written)
        _write_config(folder / "config.resolved.yaml", self.files.resolved)
        module.model_config.save_pretrained(folder / "model_assets")
        module.tokenizer.save_pretrained(folder / "model_assets")


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
