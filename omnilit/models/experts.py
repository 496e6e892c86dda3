"""Experts spread over ranks, by transformers' own functions on our meshes.

What is not public of transformers' expert parallelism is used in this file and nowhere else: the
names of two styles of a plan, and the function that applies it. Tokens travel to the ranks that
hold their experts and back by all-to-all, as many as the router says: none is dropped or padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Final

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from omnilit.config.parallel_rules import EXPERTS as KEY
from omnilit.errors import ConfigError, Problem

_SPLIT: Final = "grouped_gemm"  # of a parameter: one expert a row, rows split over ranks
_DISPATCH: Final = "ep_dispatch_experts"  # of a module: tokens travel to their experts


def spread_experts(
    model: PreTrainedModel, *, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh
) -> list[nn.Module]:
    """Split the experts of every layer over ranks, and send tokens to them and back.

    Call it once kernels are bound, which then compute the experts that a rank holds, and before
    anything is sharded. The module's `num_experts` becomes the number of those.

    Args:
        model: On the meta device or real; its experts divide, see `models.fit`.
        ep_mesh: The ranks that split the experts of one copy of the model.
        tp_mesh: The ranks that hold the same tokens: each sends its share of them.

    Returns:
        The modules that hold experts, in forward order; their parameters are DTensors on
        `ep_mesh`.

    Raises:
        ConfigError: transformers has no plan for this model's experts, or not for all of them.
    """
    plan = expert_plan(model)
    experts = [model.get_submodule(name) for name, style in plan.items() if style == _DISPATCH]
    if problems := _find_problems(model, plan, experts):
        raise ConfigError.of(problems)
    apply_expert_parallelism(model, ep_mesh, tp_mesh, plan, ep_implementation="all_to_all")
    for module in experts:
        _bind_forward(module)
    return experts


def expert_plan(model: PreTrainedModel) -> dict[str, str]:
    """Transformers' rules for the experts of `model`, one a parameter or module by its full name.

    What a plan says of other modules is for ranks that share a batch, and is left out.
    """
    rules = {rule: style for rule, style in model.ep_plan.items() if style in (_SPLIT, _DISPATCH)}
    plan: dict[str, str] = {}
    for module_name, module in model.named_modules():
        inside = [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
        for name in (*inside, module_name):  # parameters are split before the module is hooked
            if style := rules.get(replace_layer_number_by_wildcard(name)):
                plan[name] = style
    return plan


def _find_problems(
    model: PreTrainedModel, plan: Mapping[str, str], experts: list[nn.Module]
) -> list[Problem]:
    if not experts:
        problem = f"transformers has no expert-parallel plan for {model.config.model_type!r}"
        return [Problem(KEY, problem, "leave ep_size out, or train a model that has one")]
    whole = [
        f"{name}.{inside}"
        for name, style in plan.items()
        if style == _DISPATCH
        for inside, _ in model.get_submodule(name).named_parameters()
        if plan.get(f"{name}.{inside}") != _SPLIT
    ]
    if not whole:
        return []
    problem = f"transformers' plan splits the experts of {type(model).__name__}, but not "
    return [Problem(KEY, f"{problem}{', '.join(whole[:3])}", "leave ep_size out for this model")]


def _bind_forward(module: nn.Module) -> None:
    """Make what transformers installed a method again, as what is bound elsewhere is."""
    installed: Callable[..., Tensor] = module.forward
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())

    def forward(_: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return installed(hidden, index, weights)

    module.forward = MethodType(forward, module)
