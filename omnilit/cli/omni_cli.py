"""LightningCLI over a checked plan: it parses Lightning's own group and shows the help."""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentError
from collections.abc import Mapping
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
    EvaluationSchedule,
    MetricsRecorder,
    StartupReport,
    progress_callback,
)
from omnilit.cli.owners import KEPT
from omnilit.cli.plan import HIDDEN, Reading, RunPlan, resolved_tree
from omnilit.cli.run_folder import RunFiles, RunFolder
from omnilit.config import (
    DataloaderConfig,
    DPOConfig,
    InferArguments,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.errors import ConfigError
from omnilit.modules import OmniDataModule, OmniModule
from omnilit.strategies import OmniStrategy

GROUPS: Final = ("model", "data", "train", "dpo_config", "infer", "trainer")


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
            args={"trainer": self.given_trainer},
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
        """Parse the `trainer` group, with our form of error."""
        assert isinstance(args, dict)
        try:
            self.config = parser.parse_object(args)
        except (ArgumentError, ValueError, TypeError, KeyError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(
                key="trainer", problem=problem, fix="see `omnilit fit --help trainer`"
            ) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: the plan has resolved what to load."""

    @override
    def instantiate_classes(self) -> None:
        """Build the three objects, each from its own part of the plan."""
        plan = self.plan
        self.config_init = self.parser.instantiate_classes(self.config)
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
        callbacks = self._callbacks(train, output_dir, _as_list(given.callbacks))
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        return {
            "accelerator": launch.device_type,
            "devices": given.devices if isinstance(given.devices, list) else launch.num_devices,
            "num_nodes": launch.num_nodes,
            "strategy": OmniStrategy(train.accelerator),
            "max_epochs": train.num_train_epochs,
            "callbacks": callbacks,
            "logger": self._loggers(given.logger, output_dir),
            "enable_progress_bar": has_bar,
            "enable_model_summary": bool(given.enable_model_summary),
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
        self, train: TrainingArguments, output_dir: Path, given: list[Callback]
    ) -> list[Callback]:
        """Ours around the user's: numbers are there before theirs run, random states after."""
        plan = self.plan
        files = RunFiles(
            output_dir,
            plan.raw.written,
            resolved_tree(plan),
            is_resume=plan.load_path is not None,
            is_overwrite=train.checkpoint.overwrite,
        )
        is_shown = self.given_trainer.get("enable_progress_bar", True)
        bar = progress_callback(is_terminal=sys.stderr.isatty())
        return [
            RunFolder(files),
            StartupReport(),
            MetricsRecorder(output_dir),
            *([bar] if is_shown else []),
            *given,
            EvaluationSchedule(eval_steps=train.eval_steps, eval_epochs=train.eval_epochs),
            CheckpointSaver(train.checkpoint),
        ]

    def _loggers(self, given: object, output_dir: Path) -> list[Logger] | bool:
        if given is False:
            return False
        own = TensorBoardLogger(save_dir=output_dir, name="tensorboard", version="")
        return [own, *(item for item in _as_list(given) if isinstance(item, Logger))]


def print_config(reading: Reading) -> str:
    """Every field of the task as YAML: what was given, else the reference's default.

    Raises:
        ConfigError: A key or a type is wrong.
    """
    if reading.problems:
        raise ConfigError.of(reading.problems)
    tree: dict[str, Any] = {group: {} for group in GROUPS}
    for entry in reading.fields:
        if not entry.required:  # null would not be a value of its type
            _put(tree, entry.path, entry.default)
    _lay_over(tree, reading.checked.values)
    tree["model"] = {"class_path": reading.task.class_path, "init_args": tree["model"]}
    tree["trainer"] = {"accelerator": "auto", "devices": "auto", **reading.trainer}
    shown = {group: values for group, values in tree.items() if values}
    return yaml.safe_dump(shown, sort_keys=False)


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
    shown = (group,) if group else ("model", "data", "train")
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


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *groups, leaf = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[leaf] = list(value) if isinstance(value, tuple) else value


def _lay_over(tree: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and tree[key]:
            _lay_over(tree[key], value)
        else:
            tree[key] = list(value) if isinstance(value, tuple) else value
