"""A tiny model, bound and sharded over all ranks as `assemble` does it."""

from __future__ import annotations

import torch.distributed as dist
import transformers as hf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from omnilit.config import GradientCheckpointingConfig, OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.blocks import sharding_units
from omnilit.models.recompute import enable_recomputation
from omnilit.parallel.fsdp import shard_model
from tests.helpers.models import tiny


def build_sharded(
    family: str, *, recompute: bool = False, offload: bool = False
) -> tuple[hf.PreTrainedModel, Binding]:
    """A model in float32 and what was bound to it.

    Args:
        family: See `tiny`.
        recompute: Forget the activations of blocks.
        offload: Keep parameters in host memory.
    """
    model = tiny(family)
    kernels = resolve_kernels(OpsImplementationConfig(), given=frozenset(), machine=Machine("cpu"))
    binding = bind_kernels(model, kernels)
    enable_recomputation(model, GradientCheckpointingConfig(enable=recompute))
    units = sharding_units(model)
    shard_model(
        model,
        units=units.modules,
        last=units.last,
        mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        policy=MixedPrecisionPolicy(),
        reshard_after_forward=True,
        offload=offload,
    )
    return model, binding
