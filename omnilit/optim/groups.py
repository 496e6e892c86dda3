"""Parameter groups: named parts of a model, each with and without weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from omnilit.errors import ConfigError, Problem, suggest
from omnilit.parallel.collectives import gather_objects

KEY = "train.optimizer"
BACKBONE = "backbone"
MAX_LISTED = 12


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter with every name and owner it has; tied ones have several.

    Args:
        parameter: The tensor that the optimizer updates; None for another stage's.
        names: Full names in the model, the first one being its own.
        owners: Class names of the modules that hold it, without FSDP2's prefix.
        is_trained: Whether it is to be updated.
    """

    parameter: nn.Parameter | None
    names: tuple[str, ...]
    owners: tuple[str, ...]
    is_trained: bool


def name_parameters(model: nn.Module) -> list[NamedParameter]:
    """Every parameter of `model` once, in the model's order."""
    found: dict[int, tuple[nn.Parameter, list[str], list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            entry = found.setdefault(id(parameter), (parameter, [], []))
            entry[1].append(f"{prefix}.{name}" if prefix else name)
            entry[2].append(_class_name(module))
    order = [id(parameter) for parameter in model.parameters()]
    entries = (found[key] for key in order)
    return [
        NamedParameter(p, tuple(names), tuple(owners), p.requires_grad)
        for p, names, owners in entries
    ]


def _of_all_stages(own: list[NamedParameter], stages: ProcessGroup | None) -> list[NamedParameter]:
    """The parameters of a whole model, in one order on all ranks that hold stages of it."""
    if stages is None:
        return own
    told = [replace(entry, parameter=None) for entry in own]
    held = gather_objects(told, stages)
    held[stages.rank()] = own
    return [entry for stage in held for entry in stage]


def _class_name(module: nn.Module) -> str:
    name = type(module).__name__
    return name.removeprefix("FSDP") if isinstance(module, FSDPModule) else name


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay_modules: Sequence[str] = (),
    no_decay_params: Sequence[str] = (),
    part_of: Callable[[str], str] = lambda _: BACKBONE,
    rates: Mapping[str, float] = {},
    stages: ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into groups for a torch optimizer.

    Args:
        model: Sharded or not; tied parameters are taken once.
        lr: Highest learning rate.
        weight_decay: Of the parameters that decay.
        no_decay_modules: Class names of modules whose own parameters do not decay.
        no_decay_params: Parts of parameter names that do not decay, in any case of letters.
        part_of: Name of the part that a parameter, given by its full name, belongs to.
        rates: Highest learning rates of parts that have one of their own.
        stages: The ranks that hold the model's other stages, where there are any; all of them
            call and have the same groups.

    Returns:
        One dict a group: `name` ('backbone', 'backbone/no_decay'), `params`, `lr` and
        `weight_decay`; parts in the order of the model. None is empty but for other stages'.

    Raises:
        ConfigError: A pattern matches no parameter of the model, or nothing is trainable.
    """
    named = _of_all_stages(name_parameters(model), stages)
    unmatched = [
        *_unmatched_modules(named, no_decay_modules),
        *_unmatched_params(named, no_decay_params),
    ]
    if unmatched:
        raise ConfigError.of(unmatched)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for entry in named:
        if entry.is_trained:
            decays = not _is_exempt(entry, no_decay_modules, no_decay_params)
            group = members.setdefault((part_of(entry.names[0]), decays), [])
            group += [] if entry.parameter is None else [entry.parameter]
    if not members:
        raise ConfigError(
            key=KEY, problem="the model has no trainable parameter", fix="freeze less of it"
        )
    parts = dict.fromkeys(part for part, _ in members)
    return [
        {
            "name": part if decays else f"{part}/no_decay",
            "params": members[part, decays],
            "lr": rates.get(part, lr),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for part in parts
        for decays in (True, False)
        if (part, decays) in members
    ]


def _is_exempt(entry: NamedParameter, modules: Sequence[str], params: Sequence[str]) -> bool:
    return any(owner in modules for owner in entry.owners) or any(
        pattern.lower() in name.lower() for name in entry.names for pattern in params
    )


def _unmatched_modules(entries: list[NamedParameter], patterns: Sequence[str]) -> Iterator[Problem]:
    known = sorted({owner for entry in entries for owner in entry.owners})
    for pattern in patterns:
        if pattern not in known:
            yield Problem(
                f"{KEY}.no_decay_modules",
                f"no module of class {pattern!r} holds parameters.{suggest(pattern, known)}",
                f"use one of {', '.join(known)}",
            )


def _unmatched_params(entries: list[NamedParameter], patterns: Sequence[str]) -> Iterator[Problem]:
    names = [name for entry in entries for name in entry.names]
    words = sorted({word for name in names for word in name.split(".") if not word.isdigit()})
    for pattern in patterns:
        if not any(pattern.lower() in name.lower() for name in names):
            listed = ", ".join(words[:MAX_LISTED])
            yield Problem(
                f"{KEY}.no_decay_params",
                f"no parameter's name contains {pattern!r}.{suggest(pattern, words)}",
                f"use a part of a name, such as {listed}",
            )
