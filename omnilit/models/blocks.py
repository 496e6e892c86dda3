"""The repeated blocks of a model: what is sharded, recomputed and compiled one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from omnilit.errors import ConfigError, Problem, suggest
from omnilit.models.heads import output_head

BASIC: Final = "model.basic_modules"


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost repeated layers of a transformers model, in forward order.

    transformers marks them by their base class, so no family is named here.
    """
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    return blocks


@dataclass(frozen=True, slots=True)
class ShardingUnits:
    """What is gathered one at a time, in forward order.

    Args:
        modules: The embedding and the head, where they share nothing, around the decoder blocks.
        last: The head among them, whose backward begins right behind its forward.
    """

    modules: list[nn.Module]
    last: nn.Module | None


def sharding_units(
    model: PreTrainedModel, *, leaves_rest: bool = True, basic: Sequence[str] = ()
) -> ShardingUnits:
    """The parts of a model that hold its parameters gathered only while they compute.

    A tied embedding stays with the root: what the first and the last layer both need is gathered
    from one to the other in any case.

    Args:
        model: Not yet sharded.
        leaves_rest: Leave to the root what is in none of the parts, such as the last norm; else
            the modules that hold it are parts of their own.
        basic: Names of further classes of which each module is a part, from `model.basic_modules`
            and known to be in the whole model.
    """
    every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    users = Counter(map(id, every))  # a tied one comes as often as it has names
    before = _alone(model.get_input_embeddings(), nn.Embedding, users)
    behind = _alone(output_head(model), nn.Linear, users)
    modules = [*before, *decoder_blocks(model), *behind]
    if not leaves_rest:
        inside = {part for unit in modules for part in unit.modules()}
        rest = [m for m in model.modules() if m not in inside and list(m.parameters(recurse=False))]
        modules[len(modules) - len(behind) :] = [*rest, *behind]
    modules = _with_basic(model, modules, basic, behind=len(behind))
    return ShardingUnits(modules, behind[0] if behind else None)


def find_unfit_basic(model: PreTrainedModel, basic: Sequence[str]) -> list[Problem]:
    """Problems of `model.basic_modules` in a whole model, before anything is cut or sharded."""
    problems: list[Problem] = []
    classes: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        classes.setdefault(type(module).__name__, []).append(module)
    good = sorted(name for name, modules in classes.items() if not _why_unfit(model, modules))
    for name in basic:
        why = _why_unfit(model, classes[name]) if name in classes else "is no class of the model"
        if why:
            fix = f"use some of {', '.join(good)}"
            problems.append(Problem(BASIC, f"{name!r} {why}.{suggest(name, good)}", fix))
    return problems


def check_basic(model: PreTrainedModel, basic: Sequence[str]) -> None:
    """Refuse what `find_unfit_basic` finds.

    Raises:
        ConfigError: A class is not in the model, or cannot be sharded on its own.
    """
    if problems := find_unfit_basic(model, basic):
        raise ConfigError.of(problems)


def _why_unfit(model: PreTrainedModel, modules: Sequence[nn.Module]) -> str:
    """Why modules of one class cannot be parts; empty where they can."""
    if isinstance(modules[0], nn.ModuleList | nn.ModuleDict):
        return "is a container that is never called"
    if not any(True for module in modules for _ in module.parameters()):
        return "holds no parameters"
    every = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in modules:
        inside = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        if any(every[key] > number for key, number in inside.items()):
            return "shares weights with another module, and both need them gathered"
    return ""


def _with_basic(
    model: PreTrainedModel, modules: list[nn.Module], basic: Sequence[str], *, behind: int
) -> list[nn.Module]:
    """The parts with those of further classes, each before what is around it, as FSDP2 wants."""
    known = set(modules)
    found = [
        module
        for module in _inner_first(model)
        if type(module).__name__ in basic
        and module not in known
        and module is not model  # what is left over belongs to it in any case
        and not isinstance(module, FSDPModule)  # experts that are spread
        and any(True for _ in module.parameters())  # in a pipeline it may be another stage's
    ]
    ordered: list[nn.Module] = []
    placed: set[nn.Module] = set()
    for unit in modules[: len(modules) - behind]:
        inside = set(unit.modules())
        nested = [module for module in found if module in inside]
        ordered += [*nested, unit]
        placed.update(nested)
    rest = [module for module in found if module not in placed]
    return [*ordered, *modules[len(modules) - behind :], *rest] if found else modules


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inner_first(child)
    yield module


def _alone(module: nn.Module | None, kind: type[nn.Module], users: Counter[int]) -> list[nn.Module]:
    """The module where it is such a layer and no other uses its parameters, else none."""
    if not isinstance(module, kind):
        return []
    return [module] if all(users[id(p)] == 1 for p in module.parameters()) else []
