"""One pass over everything a user gave: what to run, or every mistake at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from omnilit.checkpoint.layout import resolve_load_path
from omnilit.cli.fitting import find_misfits
from omnilit.cli.imports import IMPORTS, import_given
from omnilit.cli.launch import Launch, plan_launch
from omnilit.cli.owners import KEPT, ROOT_MOVED, check_trainer_keys, check_trainer_types
from omnilit.cli.raw import Command, RawConfig, Tree, field_path, merge
from omnilit.cli.registered import check_names
from omnilit.cli.tasks import TASKS, TaskChoice, choose_task, load_task
from omnilit.cli.wandb_run import check_wandb
from omnilit.config import DPOConfig, InferArguments, OpsImplementationConfig, TrainingArguments
from omnilit.config.check import Checked, check_values
from omnilit.config.invariance_rules import INVARIANT
from omnilit.config.machine_checks import check_other_run, check_output_dir, check_paths
from omnilit.config.rules import run_rules
from omnilit.config.schema import Field, constructor_fields, dataclass_fields
from omnilit.config.status import load_status, refuse_later
from omnilit.config.view import View
from omnilit.errors import ConfigError, KernelError, Problem
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.kernels.slots import SLOTS
from omnilit.models.compilation import KEY as COMPILE
from omnilit.models.compilation import compiler_problems
from omnilit.models.init_device import KEY as INIT_DEVICE
from omnilit.models.init_device import check_init_device
from omnilit.modules import OmniDataModule, OmniModule

T = TypeVar("T")
Verb = Literal["fit", "validate"]
OPS = "model.ops_implementation"
HIDDEN = frozenset({"train", "dpo_config"})
CLASS_PATH = "model.class_path"
# What says on which device a run is, and with how many processes
DEVICE_KEYS = frozenset({"trainer", "trainer.accelerator"})
LAUNCH_KEYS = DEVICE_KEYS | {"trainer.devices", "trainer.num_nodes"}
DATA_TYPE = "data.data_type"
# What `omnilit data` reads of the values: where these begin
READ_BY_DATA = (
    "imports",
    "data.",
    "model.config_path",
    "model.model_path",
    "model.tokenizer_path",
    "model.trust_remote_code",
    "model.num_labels",
    "model.label_names",
    "train.seed",
    "train.dyn_bsz",
    "train.micro_batch_size",
    "train.pad_to_length",
    "train.bsz_warmup",
)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A checked run: nothing in it is wrong, as far as can be told before it starts.

    Args:
        verb: "fit" or "validate".
        raw: What was given.
        task: The module to build.
        view: Every value, given or default.
        launch: Processes and their device.
        kernels: What runs each operation here.
        load_path: The checkpoint to go on from.
        trainer: The given keys of Lightning's group.
    """

    verb: Verb
    raw: RawConfig
    task: TaskChoice
    view: View
    launch: Launch
    kernels: KernelSet
    load_path: Path | None
    trainer: Mapping[str, Any]

    def build(self, kind: type[T], prefix: str) -> T:
        """A dataclass of the argument tree with this run's values."""
        return build(kind, prefix, self.view)

    @property
    def given_kernels(self) -> frozenset[str]:
        """Fields of `ops_implementation` that were given, whatever their value."""
        return given_kernels(self.view)


@dataclass(frozen=True, slots=True)
class Reading:
    """What was given, with keys and types checked and nothing else."""

    raw: RawConfig
    task: TaskChoice
    fields: Sequence[Field]
    checked: Checked
    trainer: Mapping[str, Any]
    problems: tuple[Problem, ...]


def read(command: Command) -> Reading:
    """Merge files and flags, and check every key and type; nothing is raised for those."""
    own = {name: task_fields(load_task(name)) for name in TASKS}
    fields_of_all = {entry.path: entry for fields in own.values() for entry in fields}
    raw = import_given(merge(command, fields_of_all.values()))
    known = task_fields(choose_task(_good_part(raw)).module_class)
    if not fields_of_all.keys() >= {entry.path for entry in known}:  # a class from elsewhere
        raw = import_given(merge(command, [*fields_of_all.values(), *known]))
    return _check_reading(raw, known, own)


def _check_reading(
    raw: RawConfig, known: Sequence[Field], own: Mapping[str, Sequence[Field]]
) -> Reading:
    tree = _good_part(raw)
    task = choose_task(tree)
    problems = [*raw.problems, *task.problems]
    for key in [key for key in ROOT_MOVED if key in tree]:
        tree.pop(key)
        fix = f"set {ROOT_MOVED[key]} instead"
        problems.append(Problem(key, f"belongs to {ROOT_MOVED[key]}", fix))
    trainer = tree.pop("trainer", None) or {}
    if not isinstance(trainer, Mapping):
        fix = f"write keys under it: {', '.join(KEPT)}"
        problems.append(Problem("trainer", f"{trainer!r} is not a group", fix))
        trainer = {}
    tree["model"] = (
        dict(task.fields) if isinstance(tree.get("model", {}), Mapping) else tree["model"]
    )
    mine = {entry.path for entry in known}
    others = {f.path: name for name in own for f in own[name] if f.path not in mine}
    checked = check_values(tree, known, others=("trainer",), tasks=others)
    is_class_known = all(problem.key != CLASS_PATH for problem in task.problems)
    names = {entry.path.split(".")[1] for entry in known if entry.path.startswith("model.")}
    problems += [
        problem
        for problem in checked.problems
        # an own class that cannot be imported may well have this field
        if is_class_known or not _is_foreign(problem.key, names)
    ]
    return Reading(raw, task, known, checked, trainer, tuple(problems))


def _is_foreign(path: str, names: set[str]) -> bool:
    """Whether `path` is a top field of `model` that none of our own classes has."""
    group, _, name = path.partition(".")
    return group == "model" and name.split(".")[0] not in names


def make_plan(verb: Verb, command: Command) -> RunPlan:
    """Check a run whole.

    Raises:
        ConfigError: Every problem found, in one error.
    """
    reading = read(command)
    checked, problems = reading.checked, list(reading.problems)
    problems += check_trainer_keys(reading.trainer)
    launch, more = plan_launch(reading.trainer)
    problems += more
    wrong = set(checked.doubtful) | _wrong_fields(problems, reading.fields)
    problems += check_trainer_types(reading.trainer, wrong=wrong)
    world_size = None if wrong & LAUNCH_KEYS else launch.world_size
    view = View.of(checked, list(reading.fields), world_size=world_size, verb=verb)
    later = refuse_later(view, load_status())
    problems += later
    wrong |= {problem.key for problem in later}
    problems += run_rules(view, doubtful=wrong)
    wrong |= {problem.key for problem in problems}
    problems += check_names(view, wrong)
    found = [*check_paths(view), *check_wandb(view, reading.trainer)]
    problems += [p for p in found if p.key not in wrong]
    wrong |= {problem.key for problem in problems}
    problems += find_misfits(view, wrong)
    if not wrong & (DEVICE_KEYS | {INIT_DEVICE}):
        problems += check_init_device(view[INIT_DEVICE], trains_on=launch.device_type)
    kernels, more = _kernels(view, launch, wrong)
    problems += more
    problems += _lacks_compiler(view, launch, wrong)
    load_path, more = _load_path(view, launch, wrong)
    problems += more
    if problems or kernels is None:
        raise ConfigError.of(problems)
    return RunPlan(
        verb,
        reading.raw,
        reading.task,
        view,
        launch,
        kernels,
        load_path,
        reading.trainer,
    )


def make_data_view(command: Command) -> View:
    """Check what a look into the data reads: the data, its batches, and where the tokenizer is.

    Every key and type is checked, as for a run. Records of a `data_type` whose task comes with a
    later release can be looked at; settings of devices, optimizer and output do not matter.

    Raises:
        ConfigError: Every problem found, in one error.
    """
    reading = read(command)
    problems = list(reading.problems)
    wrong = set(reading.checked.doubtful) | _wrong_fields(problems, reading.fields)
    view = View.of(reading.checked, list(reading.fields), verb="data")
    later = [p for p in refuse_later(view, load_status()) if p.key != DATA_TYPE]
    found = [*later, *run_rules(view, doubtful=wrong)]
    problems += [problem for problem in found if problem.key.startswith(READ_BY_DATA)]
    problems += check_names(view, wrong)
    wrong |= {problem.key for problem in problems}
    problems += [p for p in check_paths(view) if p.key not in wrong]
    if problems:
        raise ConfigError.of(problems)
    return view


def _wrong_fields(problems: Sequence[Problem], fields: Sequence[Field]) -> set[str]:
    """Where the problems are, and the fields around them where they are about an item of one."""
    keys = {field_path(problem.key) for problem in problems}
    around = {entry.path for entry in fields for key in keys if key.startswith(f"{entry.path}.")}
    return keys | around


def task_fields(module_class: type[OmniModule]) -> list[Field]:
    """Every field that a configuration file of this task may hold."""
    found = [
        IMPORTS,
        *constructor_fields(module_class, "model", hidden=HIDDEN),
        *constructor_fields(OmniDataModule, "data", hidden=HIDDEN),
        *dataclass_fields(TrainingArguments, "train"),
        *dataclass_fields(InferArguments, "infer"),
    ]
    if _takes(module_class, "dpo_config"):
        found += dataclass_fields(DPOConfig, "dpo_config")
    return found


def build(kind: type[T], prefix: str, view: View) -> T:
    """A dataclass of the argument tree, its nested groups included, from a view of values."""
    hints = get_type_hints(kind)
    assert is_dataclass(kind)
    values = {}
    for entry in fields(kind):
        path, hint = f"{prefix}.{entry.name}", hints[entry.name]
        is_group = isinstance(hint, type) and is_dataclass(hint)
        values[entry.name] = build(hint, path, view) if is_group else view[path]
    return kind(**values)


def given_kernels(view: View) -> frozenset[str]:
    """Fields of `ops_implementation` that name a kernel and were given."""
    return frozenset(name for name in SLOTS if view.is_given(f"{OPS}.{name}"))


def _takes(module_class: type[OmniModule], name: str) -> bool:
    shown = constructor_fields(module_class, "model", hidden=frozenset({"train"}))
    return any(entry.path.startswith(f"model.{name}") for entry in shown)


def _good_part(raw: RawConfig) -> Tree:
    """A copy of what was given without the leaves that have a problem already."""
    kept = deepcopy(raw.resolved)
    for path in [problem.key for problem in raw.problems]:
        *parents, leaf = path.split(".")
        group: Any = kept
        for key in parents:
            group = group[int(key)] if isinstance(group, list) else group.get(key, {})
        if isinstance(group, dict):  # an item of a list stays, as the text that it is
            group.pop(leaf, None)
    return kept


def _kernels(view: View, launch: Launch, wrong: set[str]) -> tuple[KernelSet | None, list[Problem]]:
    """What runs each operation on the launch's device, where that is known."""
    if wrong & {*DEVICE_KEYS, INVARIANT} or any(path.startswith(OPS) for path in wrong):
        return None, []
    ops, machine = build(OpsImplementationConfig, OPS, view), Machine.detect(launch.device_type)
    try:
        kernels = resolve_kernels(
            ops, given=given_kernels(view), machine=machine, is_invariant=view[INVARIANT]
        )
    except KernelError as error:
        return None, list(error.problems)
    return kernels, []


def _lacks_compiler(view: View, launch: Launch, wrong: set[str]) -> list[Problem]:
    """A problem where blocks are to be compiled and the launch's device has no compiler."""
    if wrong & {*DEVICE_KEYS, COMPILE} or not view[COMPILE]:
        return []
    return compiler_problems(Machine.detect(launch.device_type))


def _load_path(view: View, launch: Launch, wrong: set[str]) -> tuple[Path | None, list[Problem]]:
    """The checkpoint to load; and for `fit` whether the run directory can take this run."""
    key = "train.checkpoint.load_path"
    if key in wrong or "train.checkpoint.output_dir" in wrong:
        return None, []
    problems = []
    if launch.rank == 0:  # the others write nothing and would find what rank 0 began
        problems = [*check_output_dir(view), *check_other_run(view)]
    try:
        found = resolve_load_path(view[key], Path(view["train.checkpoint.output_dir"]))
    except ConfigError as error:
        return None, [*problems, *error.problems]
    if found is None and "model.model_path" not in wrong:
        problems += _check_weights(view, key)
    return found, problems


def _check_weights(view: View, key: str) -> list[Problem]:
    """A problem where an evaluation would be of random weights."""
    if view.verb != "validate" or view["model.model_path"]:
        return []
    what = "auto finds no checkpoint in output_dir" if view[key] else "no checkpoint is named"
    return [
        Problem(
            key,
            f"{what}, and without model.model_path the weights to evaluate would be random",
            "set train.checkpoint.load_path: auto and the output_dir of a run that saved, or give "
            "model.model_path",
        )
    ]
