"""LightningCLI over a checked plan: it parses Lightning's own group and shows the help."""

from __future__ import annotations

import inspect
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, cast

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from typing_extensions import override

from omnilit.callbacks import (
    CheckpointSaver,
    ConfusionTable,
    EvalSamples,
    EvaluationSchedule,
    HyperparameterLog,
    MetricsRecorder,
    StartupReport,
    chosen_callbacks,
    progress_callback,
)
from omnilit.checkpoint.save import saved_step
from omnilit.cli.imports import IMPORTS
from omnilit.cli.owners import KEPT
from omnilit.cli.plan import HIDDEN, OPS, Reading, RunPlan
from omnilit.cli.resolved import BUFFER, GROUPS, printed_tree, resolved_tree
from omnilit.cli.run_folder import RunFiles, RunFolder
from omnilit.cli.stock import settle_callbacks
from omnilit.cli.wandb_run import WandbRun, open_wandb
from omnilit.config import (
    DataloaderConfig,
    DPOConfig,
    InferArguments,
    LoraArguments,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.errors import ConfigError
from omnilit.modules import OmniDataModule, OmniModule
from omnilit.strategies import OmniStrategy

NOTE: Final = f"""\
# Every field: what was given, else the reference's default. A field that is given is taken
# literally. Before running this file, delete what you do not mean to choose:
# - {OPS} lists the reference's kernels, most of which need a GPU;
#   without the group, the best kernels that the machine can run are taken;
# - {BUFFER} selects packing in order;
#   without it, packing chooses from the whole pass.
"""


class OmniCLI(LightningCLI):
    """Builds module, data module and trainer from a plan.

    Args:
        plan: A run that was checked whole.
    """

    model: OmniModule
    datamodule: OmniDataModule
    trainer: Trainer

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.given_trainer = dict(plan.trainer)
        super().__init__(
            plan.task.module_class,
            OmniDataModule,
            save_config_callback=None,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
            args={"trainer": deepcopy(self.given_trainer)},  # parsing writes into it
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Nothing: the only seed is `train.seed`."""

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's own group; ours are checked and built by the plan."""
        parser.add_lightning_class_args(Trainer, "trainer")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the `trainer` group, which the plan has found good."""
        assert isinstance(args, dict)
        self.config = parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the plan has resolved what to load."""

    @override
    def instantiate_classes(self) -> None:
        """Build the three objects, each from its own part of the plan."""
        plan = self.plan
        self.config_init = self.parser.instantiate(self.config)
        train = plan.build(TrainingArguments, "train")
        self.model = self._build_module(train)
        self.datamodule = self._build_data(train)
        self.trainer = self.instantiate_trainer(**self._trainer_arguments(train))

    def _build_module(self, train: TrainingArguments) -> OmniModule:
        plan = self.plan
        arguments = _top_level(plan, "model")
        arguments["ops_implementation"] = plan.build(
            OpsImplementationConfig, "model.ops_implementation"
        )
        arguments["lora"] = plan.build(LoraArguments, "model.lora")
        if any(path.startswith("dpo_config.") for path in plan.view.fields):
            arguments["dpo_config"] = plan.build(DPOConfig, "dpo_config")
        module = plan.task.module_class(**arguments, train=train)
        module.given_kernels = plan.given_kernels
        return module

    def _build_data(self, train: TrainingArguments) -> OmniDataModule:
        arguments = _top_level(self.plan, "data")
        arguments["dataloader"] = self.plan.build(DataloaderConfig, "data.dataloader")
        data = OmniDataModule(**arguments, train=train)
        data.is_buffer_size_given = self.plan.view.is_given("data.dyn_bsz_buffer_size")
        return data

    def _trainer_arguments(self, train: TrainingArguments) -> dict[str, Any]:
        launch, output_dir = self.plan.launch, Path(train.checkpoint.output_dir)
        given = cast("Namespace", self.config_init["trainer"])
        has_evaluation = self.plan.view["data.eval_path"] is not None
        own: list[Callback] = _as_list(given.callbacks)
        settle_callbacks(own, output_dir, has_evaluation=has_evaluation)
        wandb = self._wandb_run(train, output_dir)  # last: from here on there is a run elsewhere
        extra = [*chosen_callbacks(train), *([wandb] if wandb else [])]
        callbacks = self._callbacks(train, output_dir, own, extra)
        loggers = self._loggers(given.logger, output_dir)
        if wandb is not None and isinstance(loggers, list):
            loggers.append(wandb.logger)
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        return {
            "accelerator": launch.device_type,
            "devices": given.devices if isinstance(given.devices, list) else launch.num_devices,
            "num_nodes": launch.num_nodes,
            "strategy": OmniStrategy(train.accelerator),
            "max_epochs": train.num_train_epochs,
            "callbacks": callbacks,
            "logger": loggers,
            "enable_progress_bar": has_bar,
            "enable_model_summary": False,
            "inference_mode": self.given_trainer.get("inference_mode", False),
            "default_root_dir": output_dir,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            # what EvaluationSchedule decides can be any step; stock callbacks go by these two
            "val_check_interval": 1 if has_evaluation else 1.0,
            "check_val_every_n_epoch": None if has_evaluation else 1,
            "log_every_n_steps": 1,
        }

    def _callbacks(
        self,
        train: TrainingArguments,
        output_dir: Path,
        given: list[Callback],
        extra: list[Callback],
    ) -> list[Callback]:
        """Ours around the user's: numbers are there before theirs run, random states after."""
        plan = self.plan
        resolved = resolved_tree(plan)
        files = RunFiles(
            output_dir,
            plan.raw.written,
            resolved,
            load_path=plan.load_path,
            is_overwrite=train.checkpoint.overwrite,
        )
        is_shown = self.given_trainer.get("enable_progress_bar", True)
        bar = progress_callback(is_terminal=sys.stderr.isatty())
        return [
            RunFolder(files),
            HyperparameterLog(resolved),
            StartupReport(),
            *([EvalSamples(train, output_dir)] if train.eval_samples else []),
            MetricsRecorder(output_dir),
            ConfusionTable(),
            *([bar] if is_shown else []),
            *given,
            EvaluationSchedule(eval_steps=train.eval_steps, eval_epochs=train.eval_epochs),
            *extra,
            CheckpointSaver(train.checkpoint),
        ]

    def _wandb_run(self, train: TrainingArguments, output_dir: Path) -> WandbRun | None:
        plan, is_trial = self.plan, bool(self.given_trainer.get("fast_dev_run"))
        if plan.verb != "fit" or not train.wandb.enable or is_trial or plan.launch.rank != 0:
            return None
        return open_wandb(train.wandb, output_dir, load_path=plan.load_path)

    def _loggers(self, given: object, output_dir: Path) -> list[Logger] | bool:
        if given is False:
            return False
        others = [item for item in _as_list(given) if isinstance(item, Logger)]
        if self.plan.verb != "fit":
            return others
        load_path = self.plan.load_path
        step = saved_step(load_path) if load_path is not None else None
        own = TensorBoardLogger(
            save_dir=output_dir,
            name="tensorboard",
            version="",
            purge_step=None if step is None else step + 1,  # what an abandoned run wrote after it
            default_hp_metric=False,
        )
        return [own, *others]


def print_config(reading: Reading) -> str:
    """Every field of the task as YAML, under a note on what to delete before it is run.

    Raises:
        ConfigError: A key or a type is wrong.
    """
    if reading.problems:
        raise ConfigError.of(reading.problems)
    return NOTE + yaml.safe_dump(printed_tree(reading), sort_keys=False)


def print_help(verb: str, group: str, module_class: type[OmniModule]) -> None:
    """Show the fields of one group, or of all groups that are ours.

    Raises:
        ConfigError: There is no such group.
    """
    if group not in ("", *GROUPS):
        fix = f"use one of {', '.join(GROUPS)}"
        raise ConfigError(key="--help", problem=f"there is no group {group!r}", fix=fix)
    usage = f"omnilit {verb} --config FILE [--path.to.field VALUE ...]"
    more = f"Lightning's own arguments: omnilit {verb} --help trainer"
    parser = LightningArgumentParser(usage=usage, description=more, add_help=False)
    shown = (group,) if group else (IMPORTS.path, "model", "data", "train")
    if IMPORTS.path in shown:
        parser.add_argument(f"--{IMPORTS.path}", type=IMPORTS.annotation, help=IMPORTS.description)
    if "model" in shown:
        parser.add_class_arguments(module_class, "model", skip={*HIDDEN}, instantiate=False)
    if "data" in shown:
        parser.add_class_arguments(OmniDataModule, "data", skip={*HIDDEN}, instantiate=False)
    for name, kind in (
        ("train", TrainingArguments),
        ("dpo_config", DPOConfig),
        ("infer", InferArguments),
    ):
        if name in shown:
            parser.add_class_arguments(kind, name, instantiate=False)
    if "trainer" in shown:
        parser.add_class_arguments(Trainer, "trainer", skip=_not_kept(), instantiate=False)
    parser.print_help(sys.stdout)


def _not_kept() -> set[str | int]:
    parameters = inspect.signature(Trainer.__init__).parameters
    return {name for name in parameters if name not in (*KEPT, "self")}


def _top_level(plan: RunPlan, group: str) -> dict[str, Any]:
    """The values of a group's own fields, without those of its nested groups."""
    own = [path for path in plan.view.fields if path.startswith(f"{group}.")]
    names = {path: path.removeprefix(f"{group}.") for path in own}
    return {name: plan.view[path] for path, name in names.items() if "." not in name}


def _as_list(value: object) -> list[Any]:
    if value in (None, True, False):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
