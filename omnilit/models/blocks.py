"""The repeated blocks of a model: what is sharded, recomputed and compiled one at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


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


def sharding_units(model: PreTrainedModel, *, leaves_rest: bool = True) -> ShardingUnits:
    """The parts of a model that hold its parameters gathered only while they compute.

    A tied embedding stays with the root: what the first and the last layer both need is gathered
    from one to the other in any case.

    Args:
        model: Not yet sharded.
        leaves_rest: Leave to the root what is in none of the parts, such as the last norm; else
            the modules that hold it are parts of their own.
    """
    every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    users = Counter(map(id, every))  # a tied one comes as often as it has names
    before = _alone(model.get_input_embeddings(), nn.Embedding, users)
    behind = _alone(model.get_output_embeddings(), nn.Linear, users)
    modules = [*before, *decoder_blocks(model), *behind]
    if not leaves_rest:
        inside = {part for unit in modules for part in unit.modules()}
        rest = [m for m in model.modules() if m not in inside and list(m.parameters(recurse=False))]
        modules[len(modules) - len(behind) :] = [*rest, *behind]
    return ShardingUnits(modules, behind[0] if behind else None)


def _alone(module: nn.Module | None, kind: type[nn.Module], users: Counter[int]) -> list[nn.Module]:
    """The module where it is such a layer and no other uses its parameters, else none."""
    if not isinstance(module, kind):
        return []
    return [module] if all(users[id(p)] == 1 for p in module.parameters()) else []
