"""The values of a model: a seeded start, the files of a trained one, and the way back out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils import swap_tensors
from transformers import PreTrainedConfig, PreTrainedModel

from omnilit.errors import ConfigError
from omnilit.models.build import build_meta
from omnilit.models.lora import saved_tensors
from omnilit.models.seeds import seed_of
from omnilit.models.stored_weights import read_own_weights, stored_tensors
from omnilit.models.weight_report import KEY, listed
from omnilit.parallel.collectives import gather_objects, is_distributed, raise_together
from omnilit.parallel.materialize import Values, fill, named_tensors
from omnilit.parallel.pieces import gather

HOST: Final = torch.device("cpu")


def initial_tensors(
    blueprint: PreTrainedModel, *, seed: int, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The values of an untrained model, a module at a time, so that it never is in memory whole.

    Each module is initialised by the model's own rules from a random state that depends only on
    `seed` and the module's name: the values are the same for any number of ranks and any mesh.

    Args:
        blueprint: The model on the meta device, as `build_meta` returns it; the same afterwards.
        seed: `train.seed`.
        names: Which tensors are wanted; default: all parameters and buffers.

    Yields:
        Name and full CPU tensor, tied parameters once.

    Raises:
        ConfigError: The model's code has no initial value for a wanted tensor.
    """
    tensors = named_tensors(blueprint)
    wanted = set(tensors if names is None else names)
    plan = _plan_writes(blueprint, tensors)
    last = {name: module for module, written in plan.items() for name in written}
    if orphans := sorted(wanted - last.keys()):
        raise ConfigError(
            key=KEY,
            problem=f"{type(blueprint).__name__} gives {listed(orphans)} no initial value",
            fix="start from existing weights: give model_path",
        )
    owners = {name: (module, owner) for name, module, owner in _initialised_modules(blueprint)}
    for module_name, written in plan.items():
        needed = [name for name in written if name in wanted]
        if not needed:
            continue
        for name in needed:
            _make_real(tensors[name])
        _run_init(*owners[module_name], seed=seed_of(seed, module_name))
        for name in needed:
            if last[name] == module_name:
                yield name, _take_values(tensors[name])


def _initialised_modules(
    model: PreTrainedModel,
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Modules in transformers' order, children first, each with the model whose rules apply."""

    def visit(
        module: nn.Module, owner: PreTrainedModel, name: str
    ) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
        for child_name, child in module.named_children():
            child_owner = child if isinstance(child, PreTrainedModel) else owner
            yield from visit(child, child_owner, f"{name}.{child_name}" if name else child_name)
        yield name, module, owner

    yield from visit(model, model, "")


def _plan_writes(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    """Which tensors the initialisation of each module writes, found by a run without memory.

    Mostly a module's own, but some families write a child's weight again from its parent.
    """
    plan: dict[str, list[str]] = {}
    canonical = {id(tensor): name for name, tensor in tensors.items()}
    for name, module, owner in _initialised_modules(model):
        inside = [*module.parameters(), *module.buffers()]
        before = [_version(tensor) for tensor in inside]
        _run_init(module, owner, seed=0)
        written = [
            canonical[id(tensor)]
            for tensor, version in zip(inside, before, strict=True)
            if _version(tensor) != version
        ]
        if written:
            plan[name] = written
    return plan


def _version(tensor: Tensor) -> int:
    """How often the tensor was written in place; autograd counts it on meta tensors too."""
    return tensor._version  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _run_init(module: nn.Module, owner: PreTrainedModel, *, seed: int) -> None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        owner._init_weights(module)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _make_real(tensor: Tensor) -> None:
    """Give a meta tensor memory in place, so that every module that shares it sees it."""
    if tensor.is_meta:
        swap_tensors(tensor, _like(tensor, torch.empty_like(tensor, device="cpu")))


def _take_values(tensor: Tensor) -> Tensor:
    """Take the values out of a tensor and leave it on the meta device again."""
    values = tensor.detach()
    blank = _like(tensor, torch.empty_like(values, device="meta"))
    swap_tensors(tensor, blank)
    return blank.detach()


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data.detach(), requires_grad=tensor.requires_grad)
    return data.detach()


def pretrained_tensors(
    model_path: str, *, blueprint: PreTrainedModel, seed: int, strict: bool
) -> Iterator[tuple[str, Values]]:
    """The values in a folder of safetensors, in whatever layout transformers can convert.

    Args:
        model_path: A folder or a hub name.
        blueprint: The model on the meta device: its names, shapes and dtype are what is wanted.
        seed: For weights that the files lack, when not `strict`.
        strict: Whether every name must be found and none be left over.

    Yields:
        Name and full values, of which each part is read when it is asked for and before the next
        name is; buffers included, tied parameters once.

    Raises:
        ConfigError: The files cannot be read or, when `strict`, do not match by name and shape.
    """
    absent: set[str] = set()
    yield from stored_tensors(model_path, blueprint=blueprint, strict=strict, absent=absent)
    yield from initial_tensors(blueprint, seed=seed, names=absent)


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the values of a model come to its ranks, and where they stay.

    Args:
        from_rank0: Whether rank 0 alone reads or draws, and sends.
        max_bytes: What it sends of a tensor at a time; None for all of it.
        is_offloaded: Whether parameters stay in host memory; buffers are on the device.
    """

    from_rank0: bool = True
    max_bytes: int | None = None
    is_offloaded: bool = False


def load_weights(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    *,
    path: str | None,
    seed: int,
    device: torch.device,
    strict: bool = True,
    trust_remote_code: bool = False,
    delivery: Delivery = Delivery(),
) -> None:
    """Give `model` memory and its first values; every rank calls.

    Rank 0 reads or draws one tensor after the other and every rank keeps its part; or every rank
    draws them all, or reads its own part of each, and nothing is sent.

    Args:
        model: On the meta device, sharded or not, kernels bound or not.
        config: The configuration as it was read, without changes made for kernels.
        path: Folder or hub name of the weights; None draws them from `seed`.
        seed: `train.seed`.
        device: This rank's device.
        strict: Refuse files that do not name every parameter exactly once.
        trust_remote_code: Whether Python code beside the weights may run.
        delivery: Who reads and sends, and where parameters stay.

    Raises:
        ConfigError: The files cannot be read or do not match; on every rank.
    """
    blueprint = build_meta(config, dtype=model.dtype, trust_remote_code=trust_remote_code)
    materialize(model, device, is_offloaded=delivery.is_offloaded)
    names = list(named_tensors(blueprint))  # adapters are none of them
    if not delivery.from_rank0:
        waiting = set(named_tensors(model))  # of a model in stages not all
        if path is not None:
            waiting &= _read_own_part(model, path, blueprint=blueprint, strict=strict)
            path = None  # what the files lack is drawn
        names = [name for name in names if name in waiting]
    if path is None:
        tensors = initial_tensors(blueprint, seed=seed, names=names)
    else:
        tensors = pretrained_tensors(path, blueprint=blueprint, seed=seed, strict=strict)
    _deliver(model, tensors, delivery, device=device, names=names, blueprint=blueprint)


def _read_own_part(
    model: PreTrainedModel, path: str, *, blueprint: PreTrainedModel, strict: bool
) -> set[str]:
    """Read this rank's part of the files; returns names that still have no value."""
    error: BaseException | None = None
    absent: set[str] = set()
    try:
        absent = read_own_weights(model, path, blueprint=blueprint, strict=strict).absent
    except BaseException as caught:  # the others come to the same agreement
        error = caught
    raise_together(error)
    return absent


def load_buffers(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
    delivery: Delivery = Delivery(),
) -> None:
    """Give `model` memory and the buffers that no checkpoint holds; every rank calls.

    For a run that is resumed: its parameters come from the checkpoint alone.
    """
    blueprint = build_meta(config, dtype=model.dtype, trust_remote_code=trust_remote_code)
    whole = blueprint if delivery.from_rank0 else model
    names = [name for name, _ in whole.named_buffers()]
    materialize(model, device, is_offloaded=delivery.is_offloaded)
    tensors = initial_tensors(blueprint, seed=0, names=names)
    _deliver(model, tensors, delivery, device=device, names=names, blueprint=blueprint)


def _deliver(
    model: PreTrainedModel,
    tensors: Iterator[tuple[str, Values]],
    delivery: Delivery,
    *,
    device: torch.device,
    names: Collection[str],
    blueprint: PreTrainedModel,
) -> None:
    fill(
        model,
        tensors,
        device=device,
        names=names,
        from_rank0=delivery.from_rank0,
        max_bytes=delivery.max_bytes,
        whole=named_tensors(blueprint),  # of a model in stages rank 0 sends those of others too
    )


def materialize(model: nn.Module, device: torch.device, *, is_offloaded: bool = False) -> None:
    """Give every meta tensor of `model`, sharded or not, memory on `device`; values undefined.

    What is real already keeps its values and moves to `device`; tied parameters stay tied.

    Args:
        model: Sharded or not.
        device: This rank's own.
        is_offloaded: Parameters go to host memory instead, and only buffers to `device`.
    """
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)

    def place(tensor: Tensor) -> Tensor:
        home = HOST if is_offloaded and isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=home) if tensor.is_meta else tensor.to(home)

    model._apply(place)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as to_empty does
    for first, *others in tied.values():
        parameter = model.get_parameter(first)
        for name in others:
            parent, _, attribute = name.rpartition(".")
            if model.get_parameter(name) is not parameter:
                setattr(model.get_submodule(parent), attribute, parameter)


def gather_weights(model: nn.Module, *, stages: ProcessGroup | None = None) -> dict[str, Tensor]:
    """What is saved of a model, whole, on the CPU of rank 0, tied tensors once.

    That are all parameters and saved buffers, or of an adapted model what is trained.

    Every rank takes part, one tensor at a time, so that no device holds the whole model.

    Args:
        model: What this rank holds.
        stages: The ranks that hold the model's other stages, where there are any.

    Returns:
        Name to CPU tensor on rank 0; empty on the others.
    """
    is_first = not is_distributed() or dist.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    for name, full in _whole_tensors(model, stages):
        if is_first:
            gathered[name] = full.to("cpu", copy=True)
    return gathered


def _whole_tensors(model: nn.Module, stages: ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is saved, one after the other, on all ranks."""
    own = saved_tensors(model)
    if stages is None:
        yield from ((name, gather(tensor.detach())) for name, tensor in own.items())
        return
    mine = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
    device = torch.device(next(model.parameters()).device)  # of a stage that may save nothing
    for rank, others in enumerate(gather_objects(mine, stages)):
        for name, (shape, dtype) in others.items():
            if rank == stages.rank():
                full = gather(own[name].detach()).contiguous()
            else:
                full = torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(full, group_src=rank, group=stages)
            yield name, full
