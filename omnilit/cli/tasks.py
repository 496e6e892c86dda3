"""Which task a configuration describes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import omnilit.modules
from omnilit.config import DPOConfig
from omnilit.config.coerce import CoercionError, coerce
from omnilit.errors import Problem, suggest
from omnilit.modules import OmniModule

TASKS: Final = tuple(name for name in omnilit.modules.__all__ if name != "OmniDataModule")
KEY: Final = "model.class_path"
# Settings that imply a task, with the defaults that imply nothing.
VLM_DEFAULTS: Final = {
    "data": {"mm_configs": {}},
    "model": {
        "encoder_data_balance": False,
        "encoder_data_balance_sorting_algo": "post_mbs_balancing_greedy_without_pad",
    },
    "train": {"freeze_vit": False, "freeze_audio_tower": False, "vit_lr": 1e-6},
}
DATA_TYPES: Final = {
    "dpo": "DPOModule",
    "classification": "ClassificationModule",
    "diffusion": "DiffusionModule",
}


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """The task, and what is left of the `model` group once its class is taken out.

    Args:
        module_class: Built by the command line.
        class_path: How to name it in a file.
        fields: Constructor arguments as given.
        reason: Why this task, for the log.
        problems: What is wrong with the choice.
    """

    module_class: type[OmniModule]
    class_path: str
    fields: Mapping[str, Any]
    reason: str
    problems: tuple[Problem, ...] = ()


def choose_task(tree: Mapping[str, Any]) -> TaskChoice:
    """The task that `model.class_path` names, else the one that the given settings imply."""
    model = tree.get("model")
    group: Mapping[str, Any] = model if isinstance(model, Mapping) else {}
    named = group.get("class_path")
    implied, problems = _implied(tree, group, is_named=named is not None)
    arguments, more = _arguments(group)
    problems += more
    if named is None:
        name, reasons = implied or ("SFTModule", [])
        reason = f"{', '.join(reasons)} given" if reasons else "the default"
        problems += _wrong_data(load_task(name), tree)
        return TaskChoice(load_task(name), name, arguments, reason, tuple(problems))
    found, more = _load_named(str(named))
    problems += more or _wrong_data(found, tree)
    if implied and not more and _disagrees(found, implied[0]):
        what = f"{named} was named, but {', '.join(implied[1])} belongs to {implied[0]}"
        problems.append(Problem(KEY, what, "drop the one or the other"))
    return TaskChoice(found, str(named), arguments, "model.class_path", tuple(problems))


def _disagrees(named: type[OmniModule], implied: str) -> bool:
    """True where an own task was named and another own task's settings were given."""
    return named.__module__.startswith("omnilit.") and not issubclass(named, load_task(implied))


def _implied(
    tree: Mapping[str, Any], model: Mapping[str, Any], *, is_named: bool
) -> tuple[tuple[str, list[str]] | None, list[Problem]]:
    """The task whose settings were given, with those settings; two such tasks are a problem."""
    found: dict[str, list[str]] = {}
    if dpo := tree.get("dpo_config"):
        defaults = {entry.name: entry.default for entry in fields(DPOConfig)}
        is_changed = not isinstance(dpo, Mapping) or not dpo.items() <= defaults.items()
        if is_changed or not is_named:  # without a name, the group alone asks for DPO
            found["DPOModule"] = ["dpo_config"]
    data = tree.get("data")
    data_type = data.get("data_type") if isinstance(data, Mapping) else None
    if isinstance(data_type, str) and data_type in DATA_TYPES:
        found.setdefault(DATA_TYPES[data_type], []).append(f"data.data_type: {data_type}")
    for group, defaults in VLM_DEFAULTS.items():
        given = model.get("init_args", model) if group == "model" else tree.get(group)
        given = given if isinstance(given, Mapping) else {}
        changed = [
            key for key, value in defaults.items() if _is_changed(given.get(key, value), value)
        ]
        if changed:
            found.setdefault("VLMModule", []).extend(f"{group}.{key}" for key in changed)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        what = f"{one[0]} belongs to {first}, {other[0]} to {second}"
        return None, [Problem(KEY, what, "keep the settings of one task")]
    return next(iter(found.items()), None), []


def _wrong_data(task: type[OmniModule], tree: Mapping[str, Any]) -> list[Problem]:
    """A problem where the task trains on another type of data than the one given."""
    data = tree.get("data")
    if task.data_type is None or not isinstance(data, Mapping):
        return []
    given = data.get("data_type", "conversation")
    if given == task.data_type:
        return []
    what = f"{task.__name__} trains on data_type: {task.data_type}, not {given}"
    return [Problem("data.data_type", what, f"set data.data_type: {task.data_type}")]


def _is_changed(value: object, default: object) -> bool:
    try:
        return coerce(value, type(default)) != default  # YAML reads 1e-6 as text
    except CoercionError:
        return True


def _arguments(group: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Problem]]:
    """The constructor's arguments, from either way of writing the `model` group."""
    if "class_path" not in group and group.keys() != {"init_args"}:
        return group, []
    beside = [key for key in group if key not in ("class_path", "init_args")]
    init_args = group.get("init_args") or {}
    if beside:
        what = f"{', '.join(beside)} stands beside class_path"
        fix = "move it under model.init_args"
        return init_args or {key: group[key] for key in beside}, [
            Problem(f"model.{beside[0]}", what, fix)
        ]
    return init_args, []


def load_task(name: str) -> type[OmniModule]:
    """One of our own tasks, by its class's name."""
    found = getattr(omnilit.modules, name)
    assert issubclass(found, OmniModule)
    return found


def _load_named(path: str) -> tuple[type[OmniModule], list[Problem]]:
    """The class that a short or dotted name stands for."""
    short = path.removeprefix("omnilit.modules.")
    if short in TASKS:
        return load_task(short), []
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        what = f"{path!r} is no task of this program.{suggest(path, TASKS)}"
        fix = f"use one of {', '.join(TASKS)}, or the dotted path of your own class"
        return OmniModule, [Problem(KEY, what, fix)]
    return _import(path, module_name, attribute)


def _import(path: str, module_name: str, attribute: str) -> tuple[type[OmniModule], list[Problem]]:
    fix = (
        "give the dotted path of a subclass of omnilit.modules.OmniModule, and name the folder of "
        "a module that is not installed in PYTHONPATH"
    )
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        return OmniModule, [Problem(KEY, f"{path!r} cannot be imported: {error}", fix)]
    if not (isinstance(found, type) and issubclass(found, OmniModule)):
        return OmniModule, [Problem(KEY, f"{path!r} is not a subclass of OmniModule", fix)]
    return found, []
