"""The norm of all gradients, over parameters on any number of meshes, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from omnilit.parallel.collectives import gather_objects
from omnilit.parallel.local import local_part

ROW = 4096
CLIP_EPS = 1e-6  # torch's own: a zero norm does not divide by zero


def total_norm(parameters: Iterable[nn.Parameter], *, stages: DeviceMesh | None = None) -> Tensor:
    """The 2-norm of all gradients, each distinct element counted once.

    Torch's own refuses gradients on two meshes; here each mesh sums its squares and the sums are
    joined. Every rank of every mesh must call.

    Args:
        parameters: Of this rank.
        stages: The ranks that hold those of the model's other stages, where there are any.

    Returns:
        A scalar on the gradients' device, the same on all ranks; 0 without gradients.
    """
    squares = _joined_squares([_gradients(parameters)])
    if stages is not None:  # in one type, also from a rank that has no gradients to say it
        squares = _sum_over(squares.to(_dtype_on(stages.device_type)), stages)
    return squares[0].sqrt()


def group_norms(
    groups: Mapping[str, Iterable[nn.Parameter]], *, stages: ProcessGroup | None = None
) -> dict[str, float]:
    """The 2-norm of the gradients of each group, all of them in one reduction a mesh.

    Args:
        groups: By name, the same in the same order on every rank of a stage; every rank must call.
        stages: The ranks that hold the groups of the model's other stages, where there are any.

    Returns:
        One norm a group, the same on all ranks; 0 for a group without gradients.
    """
    squares = _joined_squares([_gradients(members) for members in groups.values()])
    norms = dict(zip(groups, squares.sqrt().tolist(), strict=True))
    if stages is None:
        return norms
    return {n: norm for own in gather_objects(norms, stages) for n, norm in own.items()}


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _joined_squares(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sum of squares of each group over all its meshes, [len(groups)]."""
    by_mesh: defaultdict[DeviceMesh | None, list[list[Tensor]]] = defaultdict(
        lambda: [[] for _ in groups]
    )
    for index, group in enumerate(groups):
        for gradient in group:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            by_mesh[mesh][index].append(gradient)
    totals: list[Tensor] = []
    for mesh, members in by_mesh.items():
        parts = _squares([one for group in members for one in group]).split(list(map(len, members)))
        totals.append(_sum_over(torch.stack([part.sum() for part in parts]), mesh))
    return torch.stack(totals).sum(0) if totals else torch.zeros(len(groups))


def _squares(gradients: Sequence[Tensor]) -> Tensor:
    """This rank's sum of squares of each gradient, elements that are replicated shared out."""
    locals_, copies = [], []
    for gradient in gradients:
        locals_.append(local_part(gradient))
        copies.append(_num_copies(gradient) if isinstance(gradient, DTensor) else 1)
    norms = torch.stack([_norm(local) for local in locals_])
    return norms.square() / norms.new_tensor(copies)


def _sum_over(total: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return total
    # Gradients that are kept in host memory are summed by the backend of the device all the same
    shared = total.to(mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(shared, group=mesh.get_group(dim))
    return shared.to(total.device)


def _norm(values: Tensor) -> Tensor:
    """The 2-norm of one tensor; on a CPU in float64, elsewhere in float32."""
    dtype = _dtype_on(values.device.type)
    if values.device.type != "cpu":
        return torch.linalg.vector_norm(values, dtype=dtype)
    # A CPU adds a row of float32 one after the other: at a million elements that is 1e-5 off. Rows
    # of a few thousand are not, and cost a sixth of turning all elements into float64.
    flat = values.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.cat([rows, rest[None]]), dtype=dtype)


def _dtype_on(device_type: str) -> torch.dtype:
    return torch.float64 if device_type == "cpu" else torch.float32


def _num_copies(gradient: DTensor) -> int:
    """On how many ranks of its mesh each element stands."""
    copies = 1
    for dim, placement in enumerate(gradient.placements):
        if isinstance(placement, Replicate):
            copies *= gradient.device_mesh.size(dim)
    return copies


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, *, stages: DeviceMesh | None = None
) -> Tensor:
    """Scale all gradients so that their total norm is at most `max_norm`.

    Args:
        parameters: Those of one optimizer step.
        max_norm: 0 leaves the gradients as they are.
        stages: See `total_norm`.

    Returns:
        The norm before clipping, a scalar. Where it is not finite nothing is scaled.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = total_norm(with_gradient, stages=stages)
    if max_norm > 0 and bool(torch.isfinite(norm)):
        scale = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
        for parameter in with_gradient:
            assert parameter.grad is not None
            local = local_part(parameter.grad)
            local.mul_(scale.to(local.dtype))
    return norm
