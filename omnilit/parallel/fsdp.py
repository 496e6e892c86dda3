"""FSDP2 over one mesh, with gradients that are sums: the loss already divides."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard_model(
    model: nn.Module,
    *,
    units: Iterable[nn.Module],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool,
) -> None:
    """Shard `model` in place, each of `units` on its own, the rest with the root.

    Gradients are summed over the mesh, not averaged: every micro-batch's loss is divided by the
    whole step's count of targets, so the sum is the mean's gradient at any number of ranks.

    Args:
        model: On the meta device or real; kernels are bound already.
        units: Modules gathered one at a time, usually the decoder blocks.
        mesh: One axis to shard over, or (replicate, shard).
        policy: Dtypes of compute and of the gradients' reduction.
        reshard_after_forward: Free a unit's full parameters between forward and backward.
    """
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The FSDP2 units of `model`, itself included."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_gradient_sync(model: nn.Module, *, is_on: bool) -> None:
    """Reduce gradients over ranks in the coming backward passes, or only add them up locally."""
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(is_on, recurse=False)
        module.set_is_last_backward(is_on)
