"""Adapters on one model instance.

Their arithmetic is bound before the model is split, which then computes with it. Their factors come
after that, split like the matrices that they belong to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.compiler import disable
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.functional import dropout, linear
from transformers import PreTrainedModel

from omnilit.config.lora_rules import GROUP
from omnilit.errors import ConfigError, KernelError, Problem
from omnilit.models.calls import CallCounter
from omnilit.models.lent import lent
from omnilit.models.lora.plan import Adapter, AdapterPlan
from omnilit.parallel.materialize import named_tensors

_ATTRIBUTE: Final = "omnilit_adapters"  # on the model: what of it is trained and saved
WHY_WHOLE: Final = "the matrices of all experts are replaced while they compute"


class LowRankFactor(nn.Module):
    """One factor beside the matrix of a linear layer; never called.

    Args:
        weight: [R, D] or [O, R].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ParameterFactors(nn.Module):
    """Both factors beside a parameter; never called.

    Args:
        first: [R, D], or [E, R, D] beside stacked matrices.
        second: [O, R] or [E, O, R].
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(first)
        self.lora_B = nn.Parameter(second)


@dataclass(slots=True)
class Switch:
    """Whether the adapters of a model add anything."""

    is_on: bool = True


class AdaptedModel:
    """The adapters of one model.

    Args:
        plan: What is adapted.
        counter: What they count their calls in.
        switch: Turns them off and on.
    """

    def __init__(self, plan: AdapterPlan, counter: CallCounter, switch: Switch) -> None:
        self.plan = plan
        self._counter = counter
        self._switch = switch

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The frozen model as it was before training, for as long as this lasts."""
        self._switch.is_on = False
        try:
            yield
        finally:
            self._switch.is_on = True

    def add_factors(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Put the factors beside their matrices, without values where those have none.

        Args:
            model: Kernels and adapters are bound; split over ranks, not yet cut or sharded.
            dtype: Of the factors.

        Raises:
            ConfigError: A matrix is split in a way that has no factors.
        """
        for adapter in self.plan.adapters:
            module = model.get_submodule(adapter.module)
            matrix = module.get_parameter(adapter.parameter or "weight")
            first, second = (
                torch.empty(shape, dtype=dtype, device=matrix.device) for shape in adapter.shapes
            )
            if isinstance(matrix, DTensor):
                first, second = _split_alike(adapter, matrix, first, second)
            if adapter.parameter is None:
                module.lora_A, module.lora_B = LowRankFactor(first), LowRankFactor(second)
                continue
            if not hasattr(module, "adapters"):
                module.adapters = nn.ModuleDict()
            holders = module.get_submodule("adapters")
            holders.add_module(adapter.parameter, ParameterFactors(first, second))

    def verify_called(self, total: Callable[[dict[str, float]], dict[str, float]] = dict) -> None:
        """Check after the first step that no layer went past its adapter, then stop counting.

        Args:
            total: Adds up counts over the ranks that hold the model's other stages.

        Raises:
            KernelError: Some were never called.
        """
        if not self._counter.is_counting:
            return
        names = dict.fromkeys(adapter.module for adapter in self.plan.adapters)
        calls = total({name: float(self._counter.of(name)) for name in names})
        if idle := [name for name in names if not calls[name]]:
            problem = f"{len(idle)} adapters were never called, the first is that of {idle[0]}"
            fix = "leave it out of target_modules: the model does not call it"
            raise KernelError.of([Problem(f"{GROUP}.target_modules", problem, fix)])
        self._counter.stop()


def adapt(model: PreTrainedModel, plan: AdapterPlan, *, compute: torch.dtype) -> AdaptedModel:
    """Freeze a model and bind the arithmetic of its adapters.

    Args:
        model: Whole, with kernels bound; nothing of it is split.
        plan: What is adapted.
        compute: The type that frozen parameters are kept in: it is what they would be cast to.
    """
    trained = set(plan.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name not in trained:
            parameter.data = parameter.data.to(compute)
    counter, switch = CallCounter(), Switch()
    by_module: defaultdict[str, list[Adapter]] = defaultdict(list)
    for adapter in plan.adapters:
        by_module[adapter.module].append(adapter)
    for name, adapters in by_module.items():
        module, count = model.get_submodule(name), counter.adder(name)
        if adapters[0].parameter is None:
            _adapt_linear(module, adapters[0], plan.arguments.dropout, count, switch)
        else:
            _adapt_parameters(module, adapters, count, switch)
    setattr(model, _ATTRIBUTE, plan)
    return AdaptedModel(plan, counter, switch)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: all of it, or what is trained where it is adapted."""
    if isinstance(getattr(model, _ATTRIBUTE, None), AdapterPlan):
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict().keys()
    return {name: tensor for name, tensor in named_tensors(model).items() if name in saved}


def _adapt_linear(
    module: nn.Module, adapter: Adapter, rate: float, count: Callable[[], None], switch: Switch
) -> None:
    forward = module.forward

    def adapted(self: Any, x: Tensor) -> Tensor:
        if not switch.is_on:
            return forward(x)
        count()
        first, second = self.lora_A.weight, self.lora_B.weight
        if not isinstance(x, DTensor):  # a rank's own part, as without gradients
            first, second = _local(first), _local(second)
        kept = dropout(x, rate, self.training) if rate else x
        out: Tensor = forward(x)
        return (
            out
            + linear(linear(kept.to(first.dtype), first), second).to(out.dtype) * adapter.scaling
        )

    module.forward = MethodType(adapted, module)


def _adapt_parameters(
    module: nn.Module, adapters: list[Adapter], count: Callable[[], None], switch: Switch
) -> None:
    forward = module.forward

    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not switch.is_on:
            return forward(*args, **kwargs)
        count()
        with ExitStack() as stack:
            for adapter in adapters:
                assert adapter.parameter is not None
                factors = self.adapters[adapter.parameter]
                matrix = self.get_parameter(adapter.parameter)
                whole = adapter.add_to(matrix, _local(factors.lora_A), _local(factors.lora_B))
                stack.enter_context(lent(self, adapter.parameter, whole))
            return forward(*args, **kwargs)

    module.forward = MethodType(disable(adapted, reason=WHY_WHOLE), module)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _split_alike(
    adapter: Adapter, matrix: DTensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """The factors on the mesh of their matrix: where it is split, the one beside that side is."""
    (placement,) = matrix.placements
    parts: dict[Placement, tuple[Placement, Placement]] = {Replicate(): (Replicate(), Replicate())}
    if adapter.num_experts:
        parts[Shard(0)] = (Shard(0), Shard(0))
    elif adapter.parameter is None:
        parts |= {Shard(0): (Replicate(), Shard(0)), Shard(1): (Shard(1), Replicate())}
    if type(placement) not in (Shard, Replicate) or placement not in parts:
        problem = f"{adapter.module} is split in a way that its adapter cannot follow"
        fix = "leave it out of what is adapted, or leave tp_size out"
        raise ConfigError(key=f"{GROUP}.target_modules", problem=problem, fix=fix)
    own = zip((first, second), parts[placement], strict=True)
    halves = [
        distribute_tensor(factor, matrix.device_mesh, [place], src_data_rank=None)
        for factor, place in own
    ]
    return halves[0], halves[1]
