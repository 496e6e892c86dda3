"""Data parallelism by FSDP2 over one mesh, with gradients that are sums: the loss already divides.

The mesh says what it is. Over one axis parameters are sharded; over (replicate, shard) copies of
the shards are kept in step (HSDP); where the shard axis has one rank, each holds the whole model
and only gradients travel, block by block while the backward pass still runs: that is DDP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard


def shard_model(
    *models: nn.Module,
    units: Iterable[nn.Module],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool,
    forward_prefetch: bool = False,
    last: nn.Module | None = None,
    offload: bool = False,
) -> None:
    """Shard a model in place, each of `units` on its own, the rest with the root.

    Gradients are summed over the mesh, not averaged: every micro-batch's loss is divided by the
    whole step's count of targets, so the sum is the mean's gradient at any number of ranks.

    Args:
        models: On the meta device or real; kernels are bound already. One, or the stages of a
            pipeline on this rank, which have no parameters beside the units. The last one's output
            is cast.
        units: Modules gathered one at a time, usually the decoder blocks and what stands before
            and behind them. One that is an embedding is not gathered for backward, which needs
            no more than the tokens.
        mesh: One axis to shard over, or (replicate, shard).
        policy: Dtypes of compute, of the gradients' reduction and of the model's outputs.
        reshard_after_forward: Free a unit's full parameters between forward and backward.
        forward_prefetch: Ask for a unit's parameters before its predecessor computes. In the
            backward pass FSDP2 always asks for the next ones ahead.
        last: The unit whose backward begins right behind its forward, so that it stays gathered.
        offload: Keep parameters, gradients and with them the moments in host memory; a unit is
            copied to the device when it is gathered.
    """
    units = list(units)
    storage = _storage(mesh, offload=offload)
    # cast where the whole model ends: inside, the next unit's matrices want the computing dtype
    inner = replace(policy, output_dtype=None)
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=inner,
            offload_policy=storage,
            reshard_after_forward=reshard_after_forward and unit is not last,
        )
    for model in models:
        fully_shard(
            model,
            mesh=mesh,
            mp_policy=policy if model is models[-1] else inner,
            offload_policy=storage,
            reshard_after_forward=False,
        )
    for module in (*units, *models):
        _sum_gradients(module, mesh)
        if isinstance(module, nn.Embedding):
            cast("FSDPModule", module).set_unshard_in_backward(False)
    if forward_prefetch:
        for model in models:
            _prefetch(model, units)


def shard_experts(
    experts: Iterable[nn.Module],
    *,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool,
    offload: bool = False,
) -> None:
    """Shard experts in place, each module of them on its own, before the model around them.

    Ranks that split the experts among themselves reduce no gradients of them: the tokens of all
    of them have come to the experts already. Gradients are sums here too.

    Args:
        experts: Modules whose parameters are split over the expert axis already.
        mesh: The ranks that hold the same experts: one axis to shard over, or (replicate, shard).
        policy: Dtypes of compute and of the gradients' reduction.
        reshard_after_forward: Free their full parameters between forward and backward.
        offload: See `shard_model`.
    """
    size = mesh.size(mesh.ndim - 1)
    # the block around them has cast the tokens; the routing weights may be wider on purpose
    inner = replace(policy, output_dtype=None, cast_forward_inputs=False)

    def placement(parameter: nn.Parameter) -> Shard:
        # Experts are the first dimension, and already split; FSDP2 wants others to divide evenly
        even = (dim for dim in range(1, parameter.ndim) if parameter.shape[dim] % size == 0)
        return Shard(next(even, 0))

    for module in experts:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=inner,
            offload_policy=_storage(mesh, offload=offload),
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
        )
        _sum_gradients(module, mesh)


class InPlaceReduction:
    """The reduce-scatter of one rank, which exchanges nothing: what goes in is what comes out.

    FSDP2 asks for a buffer to collect a unit's gradients in and for one of the result, and, where
    the group has one rank, copies the one to the other. Given the same twice, it copies nothing.
    """

    def __init__(self) -> None:
        self._lent: Tensor | None = None  # between the two requests for one unit's gradients

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer, or the one of the last call where that has not been given twice."""
        lent, self._lent = self._lent, None
        if lent is not None and (lent.shape, lent.dtype) == (torch.Size(size), dtype):
            return lent
        self._lent = torch.empty(*size, dtype=dtype, device=device)
        return self._lent


def _storage(mesh: DeviceMesh, *, offload: bool) -> OffloadPolicy:
    # Pinned memory is what an accelerator copies from while it computes; without one there is none
    is_pinned = mesh.device_type != "cpu"
    return CPUOffloadPolicy(pin_memory=is_pinned) if offload else OffloadPolicy()


def _sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    unit = cast("FSDPModule", module)
    if mesh.size() > 1:  # one rank has nothing to divide by, and would divide by 1.0 in earnest
        unit.set_gradient_divide_factor(1.0)
    else:
        unit.set_custom_reduce_scatter(cast("Any", InPlaceReduction()))
    unit.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _prefetch(model: nn.Module, units: Sequence[nn.Module]) -> None:
    """Name to each unit the units inside of it and its successor, among the layers of one stack.

    What a stack's last layer would name is no successor: it may not run at all, or elsewhere.
    """
    known = set(units)
    for parent in model.modules():
        stack = [child for child in parent.children() if child in known]
        for place, unit in enumerate(stack):
            own, *inside = fsdp_modules(unit)
            successor = [cast("FSDPModule", child) for child in stack[place + 1 : place + 2]]
            own.set_modules_to_forward_prefetch([*inside, *successor])


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The FSDP2 units of `model`, itself included."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_gradient_sync(model: nn.Module, *, is_on: bool) -> None:
    """Reduce gradients over ranks in the coming backward passes, or only add them up locally.

    Args:
        model: May hold several sharded models.
        is_on: False before all but the last backward pass of an optimizer step. On for each of
            them, a rank adds up its own part of the gradients and never holds them whole.
    """
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(is_on, recurse=False)
        module.set_is_last_backward(is_on)


def set_resharding(model: nn.Module, *, is_on: bool) -> None:
    """Free gathered parameters behind the coming backward passes, or leave them gathered.

    Args:
        model: May hold several sharded models.
        is_on: False keeps them for the forward pass of the step's next micro-batch.
    """
    for module in fsdp_modules(model):
        module.set_reshard_after_backward(is_on, recurse=False)


def reshard(model: nn.Module) -> None:
    """Free all gathered parameters, as after a forward pass that no backward pass follows."""
    for module in fsdp_modules(model):
        module.reshard()
