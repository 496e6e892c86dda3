"""What one rank holds of a sharded model, and what FSDP2 gathers and reduces for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

GATHERED: Final = frozenset({"fsdp", "efsdp"})  # mesh axes whose ranks gather each other's parts
COPIED: Final = "dp_replicate"


@dataclass(frozen=True, slots=True)
class HeldParameter:
    """One parameter as this rank holds it.

    Args:
        name: Full name.
        unit: Name of the FSDP2 unit that gathers it; empty for the root.
        axis: Mesh axis over which it is gathered.
        ranks: Of that axis.
        copies: Ranks that hold the same part of it, whose gradients are summed.
        numel: Elements of the whole parameter.
        own: Elements that this rank holds.
        part: Elements of the largest part: what each rank sends when it is gathered, padded.
        rows: Along the dimension that is cut over the axis, of what tensor and expert parallelism
            leave.
        itemsize: Bytes of an element.
        is_trained: Whether it gets a gradient.
    """

    name: str
    unit: str
    axis: str
    ranks: int
    copies: int
    numel: int
    own: int
    part: int
    rows: int
    itemsize: int
    is_trained: bool = True

    @property
    def is_even(self) -> bool:
        """Whether all ranks of the axis hold equally much."""
        return self.rows % self.ranks == 0


@dataclass(frozen=True, slots=True)
class HeldUnit:
    """What FSDP2 gathers at once.

    Args:
        name: Of the module; empty for the root.
        parameters: Those that it gathers.
        frees_after_forward: Gathers them a second time, for backward.
        gathers_for_backward: Needs them in backward at all.
    """

    name: str
    parameters: tuple[HeldParameter, ...]
    frees_after_forward: bool
    gathers_for_backward: bool

    @property
    def gathered(self) -> int:
        """Elements that are there while it computes."""
        return sum(held.part * held.ranks for held in self.parameters)

    @property
    def summed(self) -> int:
        """Elements of its whole gradients."""
        return sum(held.part * held.ranks for held in self.parameters if held.is_trained)


def held_units(model: nn.Module) -> list[HeldUnit]:
    """What this rank holds of `model`, by FSDP2 unit; nothing is gathered or allocated.

    Args:
        model: Sharded; the meta device will do.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    by_unit: dict[str, list[HeldParameter]] = {name: [] for name in modules}
    for name, parameter in model.named_parameters():
        unit = max((u for u in modules if not u or name.startswith(f"{u}.")), key=len)
        assert isinstance(parameter, DTensor)
        by_unit[unit].append(_held(name, unit, parameter))
    return [
        HeldUnit(name, tuple(by_unit[name]), *_habits(module))
        for name, module in modules.items()
        if by_unit[name]
    ]


def _habits(module: FSDPModule) -> tuple[bool, bool]:
    """Whether a unit frees its parameters after forward, and gathers them for backward."""
    # torch has setters for both, and no other way to read them
    state = module._get_fsdp_state()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    group = state._fsdp_param_group  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    assert group is not None, "a unit with parameters gathers them"
    # the root's own is decided when it first runs, and it is not freed
    return group.post_forward_mesh_info is not None, group.unshard_in_backward


def _held(name: str, unit: str, parameter: DTensor) -> HeldParameter:
    """Read one parameter's placements; FSDP2 cuts what the other axes leave."""
    left, cut, axis, ranks, copies = list(parameter.shape), 0, "fsdp", 1, 1
    for dim_name, size, dim in _axes(parameter):
        if dim_name in GATHERED:
            axis, ranks, cut = dim_name, size, dim or 0
        elif dim_name == COPIED:
            copies = size
        elif dim is not None:
            left[dim] = -(-left[dim] // size)
    rows = left[cut]
    return HeldParameter(
        name=name,
        unit=unit,
        axis=axis,
        ranks=ranks,
        copies=copies,
        numel=parameter.numel(),
        own=parameter.to_local().numel(),
        part=prod(left) // rows * -(-rows // ranks),
        rows=rows,
        itemsize=parameter.element_size(),
        is_trained=parameter.requires_grad,
    )


def _axes(parameter: DTensor) -> Iterator[tuple[str, int, int | None]]:
    """Name and size of each axis of the parameter's mesh, and the dimension that it splits."""
    mesh = parameter.device_mesh
    for index, name in enumerate(mesh.mesh_dim_names or ()):
        # of two kinds that shard, one with a name that torch keeps to itself
        yield name, mesh.size(index), getattr(parameter.placements[index], "dim", None)
