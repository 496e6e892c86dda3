"""The run of `train.wandb`: its beginning, its id in the run directory, its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from omnilit.checkpoint.layout import WANDB_RUN, is_own_checkpoint
from omnilit.config import WandbConfig
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem

ENABLE = "train.wandb.enable"
ID = "train.wandb.id"
STEP = "trainer/global_step"  # what Lightning calls the step of a metric there


def check_wandb(view: View, trainer: Mapping[str, object]) -> list[Problem]:
    """What keeps `train.wandb.enable` from having an effect on this machine.

    Args:
        view: The values of the run.
        trainer: The given keys of Lightning's group.
    """
    if view.verb != "fit" or not view[ENABLE]:
        return []
    problems = []
    if trainer.get("logger") is False:
        problem = "has no effect, because trainer.logger: false turns all loggers off"
        problems.append(Problem(ENABLE, problem, "leave trainer.logger out, or set this to false"))
    try:
        metadata.version("wandb")  # a folder of that name, which it makes itself, imports too
    except metadata.PackageNotFoundError:
        fix = "pip install 'omnilit[loggers]', or set this to false"
        problems.append(Problem(ENABLE, "the package wandb is not installed", fix))
    return problems


class WandbRun(Callback):
    """Keep the run's id in the run directory, and end the run when `fit` does.

    Stands behind `MetricsRecorder`, which may still write a line when a run fails.

    Args:
        logger: Hands the run what the trainer logs.
        output_dir: The run directory.
    """

    def __init__(self, logger: WandbLogger, output_dir: Path) -> None:
        self.logger = logger
        self.output_dir = output_dir

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not earlier: by now the directory is this run's, and another run's file is out of it
        path = self.output_dir / WANDB_RUN
        new = path.with_name(f".{path.name}.new")  # a run that is killed here leaves no half of it
        new.write_text(json.dumps({"id": self.logger.version}) + "\n", encoding="utf-8")
        new.replace(path)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.logger.experiment.finish()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.logger.experiment.finish(exit_code=1)


def open_wandb(config: WandbConfig, output_dir: Path, *, load_path: Path | None) -> WandbRun:
    """Begin a run there, or go on with an earlier one.

    Which one: that of `config.id`, which is made where there is none of that id; else, where a
    checkpoint of this run directory is gone on from, the one whose id stands there; else a new
    one. Call on rank 0 alone, before anything that is dear.

    Args:
        config: `train.wandb`.
        output_dir: The run directory; what is logged lies in its folder `wandb`.
        load_path: The checkpoint to go on from.

    Raises:
        ConfigError: The service cannot be reached, or does not know who asks; or the stored id
            cannot be read.
    """
    import wandb

    output_dir.mkdir(parents=True, exist_ok=True)
    run_id = config.id or _stored_id(output_dir, load_path)
    try:
        run = wandb.init(
            project=config.project,
            name=config.name,
            id=run_id,
            resume="allow" if run_id else None,
            group=config.group,
            tags=config.tags or None,
            entity=config.entity,
            dir=str(output_dir),
        )
    except wandb.Error as error:
        raise ConfigError(
            key=ENABLE,
            problem=f"wandb does not start: {str(error).rstrip('.')}",
            fix="run `wandb login`, or log on this machine alone by the variable "
            "WANDB_MODE=offline, or set this to false",
        ) from error
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    logger = WandbLogger(project=config.project, save_dir=output_dir, experiment=run)
    return WandbRun(logger, output_dir)


def _stored_id(output_dir: Path, load_path: Path | None) -> str | None:
    """The id of the run that wrote `load_path`, where that lies in `output_dir`.

    Raises:
        ConfigError: The file that holds it cannot be read.
    """
    path = output_dir / WANDB_RUN
    if load_path is None or not is_own_checkpoint(load_path, output_dir) or not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            key=ID,
            problem=f"{path}, which names the run to go on with, cannot be read: {error}",
            fix="give the id of that run, or remove the file to begin a new one",
        ) from error
