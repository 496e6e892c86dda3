"""One pass over everything a user gave: what to run, or every mistake at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from omnilit.checkpoint.layout import resolve_load_path
from omnilit.cli.launch import Launch, plan_launch
from omnilit.cli.owners import KEPT, ROOT_MOVED, check_trainer_keys
from omnilit.cli.raw import Command, RawConfig, Tree, merge, walk_leaves
from omnilit.cli.tasks import TASKS, TaskChoice, choose_task, load_task
from omnilit.config import DPOConfig, InferArguments, OpsImplementationConfig, TrainingArguments
from omnilit.config.check import Checked, check_values
from omnilit.config.machine_checks import check_other_run, check_output_dir, check_paths
from omnilit.config.rules import run_rules
from omnilit.config.schema import Field, constructor_fields, dataclass_fields
from omnilit.config.status import load_status, refuse_later
from omnilit.config.view import View
from omnilit.errors import ConfigError, KernelError, Problem
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.modules import OmniDataModule, OmniModule

T = TypeVar("T")
Verb = Literal["fit", "validate"]
OPS = "model.ops_implementation"
HIDDEN = frozenset({"train", "dpo_config"})


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A checked run: nothing in it is wrong, as far as can be told before it starts.

    Args:
        verb: "fit" or "validate".
        raw: What was given.
        task: The module to build.
        view: Every value, given or default.
        values: The given values, coerced, nested.
        launch: Processes and their device.
        kernels: What runs each operation here.
        load_path: The checkpoint to go on from.
        trainer: The given keys of Lightning's group.
    """

    verb: Verb
    raw: RawConfig
    task: TaskChoice
    view: View
    values: Mapping[str, Any]
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
    raw = merge(command)
    tree = _without(raw.resolved, [problem.key for problem in raw.problems])
    task = choose_task(tree)
    known = task_fields(task.module_class)
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
    checked = check_values(tree, known, others=("trainer",), tasks=_fields_of_other_tasks(known))
    problems += checked.problems
    return Reading(raw, task, known, checked, trainer, tuple(problems))


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
    view = View.of(checked, list(reading.fields), world_size=launch.world_size, verb=verb)
    later = refuse_later(view, load_status())
    problems += later
    doubtful = {*checked.doubtful, *(p.key for p in reading.problems), *(p.key for p in later)}
    problems += run_rules(view, doubtful=doubtful)
    wrong = doubtful | {problem.key for problem in problems}
    problems += [p for p in check_paths(view) if p.key not in wrong]
    machine = Machine.detect(launch.device_type)
    kernels, more = _kernels(view, machine, wrong)
    problems += more
    load_path, more = _load_path(view, launch, wrong)
    problems += more
    if problems or kernels is None:
        raise ConfigError.of(problems)
    return RunPlan(
        verb,
        reading.raw,
        reading.task,
        view,
        checked.values,
        launch,
        kernels,
        load_path,
        reading.trainer,
    )


def task_fields(module_class: type[OmniModule]) -> list[Field]:
    """Every field that a configuration file of this task may hold."""
    found = [
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
    """Names of the fields of `ops_implementation` that were given."""
    names = {entry.name for entry in fields(OpsImplementationConfig)}
    return frozenset(name for name in names if view.is_given(f"{OPS}.{name}"))


def _takes(module_class: type[OmniModule], name: str) -> bool:
    shown = constructor_fields(module_class, "model", hidden=frozenset({"train"}))
    return any(entry.path.startswith(f"model.{name}") for entry in shown)


def _fields_of_other_tasks(known: Sequence[Field]) -> dict[str, str]:
    mine = {entry.path for entry in known}
    return {
        entry.path: name
        for name in TASKS
        for entry in task_fields(load_task(name))
        if entry.path not in mine
    }


def _without(tree: Tree, paths: Sequence[str]) -> Tree:
    """A copy of `tree` without the leaves at `paths`: they could not be resolved."""
    kept = deepcopy(tree)
    for path in paths:
        *parents, leaf = path.split(".")
        group: Any = kept
        for key in parents:
            group = group[int(key)] if isinstance(group, list) else group[key]
        if isinstance(group, dict):
            group.pop(leaf, None)
    return kept


def _kernels(
    view: View, machine: Machine, wrong: set[str]
) -> tuple[KernelSet | None, list[Problem]]:
    if any(path.startswith(OPS) for path in wrong):
        return None, []
    ops = build(OpsImplementationConfig, OPS, view)
    try:
        return resolve_kernels(ops, given=given_kernels(view), machine=machine), []
    except KernelError as error:
        return None, list(error.problems)


def _load_path(view: View, launch: Launch, wrong: set[str]) -> tuple[Path | None, list[Problem]]:
    """The checkpoint to load; and for `fit` whether the run directory can take this run."""
    key = "train.checkpoint.load_path"
    if key in wrong or "train.checkpoint.output_dir" in wrong:
        return None, []
    problems = []
    if launch.rank == 0:  # the others write nothing and would find what rank 0 began
        problems = [*check_output_dir(view), *check_other_run(view)]
    try:
        return resolve_load_path(view[key], Path(view["train.checkpoint.output_dir"])), problems
    except ConfigError as error:
        return None, [*problems, *error.problems]


def resolved_tree(plan: RunPlan) -> Tree:
    """Every field with its value, presets resolved; values from the environment stay hidden."""
    tree: Tree = {}
    kernels = {f"{OPS}.{name}": backend for name, backend in plan.kernels.names().items()}
    written = dict(walk_leaves(plan.raw.written))
    hidden = {path.replace("model.init_args.", "model.") for path in plan.raw.from_environment}
    for path, entry in plan.view.fields.items():
        value = kernels.get(path, plan.view[path])
        if entry.required and value is None:
            continue  # of a group that this verb does not read
        if path in hidden:
            value = written.get(path, written.get(path.replace("model.", "model.init_args.", 1)))
        _put(tree, path, list(value) if isinstance(value, tuple) else value)
    tree["model"] = {"class_path": plan.task.class_path, "init_args": tree["model"]}
    tree["trainer"] = dict(plan.trainer)
    return tree


def _put(tree: Tree, path: str, value: Any) -> None:
    *groups, leaf = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[leaf] = value
