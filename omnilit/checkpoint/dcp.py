"""Models and optimizers as torch's distributed checkpoint: shards that load at any world size."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from omnilit.errors import CheckpointError
from omnilit.models.lora import saved_tensors
from omnilit.parallel.collectives import gather_objects, is_distributed
from omnilit.parallel.pieces import in_one_piece, take_from_one_piece

MODEL: Final = "model"
OPTIMIZER: Final = "optimizer"
MAX_LISTED: Final = 8


def named_state(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> dict[str, Tensor]:
    """All parameters, saved buffers and moments under the names of a checkpoint.

    Args:
        models: By the name that loading will use; every rank calls.
        optimizers: Over parameters of `models`; what they have no state for yet is left out.
    """
    state = {**_model_state(models), **_optimizer_state(models, optimizers)}
    return {name: in_one_piece(tensor) for name, tensor in state.items()}


def copy_to_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, each rank's own part of them, in memory that nobody else writes to."""
    return {name: _copy(tensor) for name, tensor in state.items()}


def _copy(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    # Not by from_local, which would move the copy to the device of the mesh
    names, layout = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}  # the local tensor and the mesh
    copies = {
        name: part.detach().to("cpu", copy=True) if isinstance(part, Tensor) else part
        for name, part in parts.items()
    }
    return DTensor.__tensor_unflatten__(copies, layout, tensor.shape, tensor.stride())


def save_tensors(
    folder: Path, state: Mapping[str, Tensor], *, group: ProcessGroup | None = None
) -> None:
    """Write tensors into `folder`; every rank calls.

    Args:
        folder: Exists; gets `.metadata` and the shards `__<rank>_<n>.distcp`, synced to disk.
        state: From `named_state`.
        group: All ranks, for a thread beside the one that trains; default: the default group.

    Raises:
        CheckpointError: Any rank failed to write; on every rank.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    is_alone = not is_distributed()
    try:
        with _one_process_is_fine():
            save(dict(state), storage_writer=writer, process_group=group, no_dist=is_alone)
    except CheckpointException as error:
        raise CheckpointError(f"the checkpoint cannot be written: {_reasons(error)}") from error


def load_tensors(
    folder: Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    stages: ProcessGroup | None = None,
) -> None:
    """Read what `save_tensors` wrote into models and optimizers of the same names, in place.

    Args:
        folder: Written at any number of ranks.
        models: Not on the meta device.
        optimizers: Get exactly the state that was saved: none where there was none. Without any,
            as in evaluation, only the models are read.
        stages: The ranks that hold the models' other stages, where there are any; each of them
            reads what it holds.

    Raises:
        CheckpointError: Names or shapes differ from those in `folder`, or it cannot be read.
    """
    stored = _read_entries(folder)
    state = _model_state(models)
    held = _names_of_stages(state, stages)
    _check_model_names(held, {name for name in stored if name.startswith(f"{MODEL}.")})
    elsewhere = {name.removeprefix(f"{MODEL}.") for name in held - state.keys()}
    moments = _make_moments(models, optimizers, stored, elsewhere)
    state.update((name, tensor) for name, (_, _, _, tensor) in moments.items())
    _read_tensors(folder, state, stored)
    for optimizer in optimizers.values():
        optimizer.state.clear()
    for optimizer, parameter, key, tensor in moments.values():
        optimizer.state[parameter][key] = tensor


def load_model(folder: Path, model: nn.Module, *, name: str) -> None:
    """Read one model of those that `save_tensors` wrote, in place; values are cast as they come.

    Args:
        folder: Written at any number of ranks.
        model: Not on the meta device; its parameters may be of another type than the saved ones.
        name: Under which it was saved.

    Raises:
        CheckpointError: Names or shapes differ from those in `folder`, or it cannot be read.
    """
    load_named(folder, saved_tensors(model), name=name)


def load_named(folder: Path, tensors: Mapping[str, Tensor], *, name: str) -> None:
    """Read the tensors of one model of those that `save_tensors` wrote, in place.

    Args:
        folder: Written at any number of ranks.
        tensors: All that were saved of it, by their names in it; values are cast as they come.
        name: Under which it was saved.

    Raises:
        CheckpointError: Names or shapes differ from those in `folder`, or it cannot be read.
    """
    start = f"{MODEL}.{name}."
    state = {f"{start}{own}": tensor.detach() for own, tensor in tensors.items()}
    stored = _read_entries(folder)
    _check_model_names(state.keys(), {entry for entry in stored if entry.startswith(start)})
    _read_tensors(folder, state, stored)


def _read_entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}


def _read_tensors(
    folder: Path, state: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]
) -> None:
    _check_shapes(state, stored)
    reader = FileSystemReader(folder)
    read = {name: in_one_piece(tensor) for name, tensor in state.items()}
    try:
        with _one_process_is_fine():
            load(dict(read), storage_reader=reader, no_dist=not is_distributed())
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {_reasons(error)}") from error
    for name, tensor in state.items():
        take_from_one_piece(tensor, read[name])


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without a process group torch warns that it takes this for a single process: it is one."""
    if is_distributed():  # nothing to hide, and filters belong to all threads
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _model_state(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for model_name, model in models.items():
        for name, tensor in saved_tensors(model).items():
            state[f"{MODEL}.{model_name}.{name}"] = tensor.detach()
    return state


def _named_parameters(
    models: Mapping[str, nn.Module], optimizer: Optimizer
) -> Iterator[tuple[str, nn.Parameter]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            if id(parameter) in held:
                yield f"{model_name}.{name}", parameter


def _optimizer_state(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for optimizer_name, optimizer in optimizers.items():
        for name, parameter in _named_parameters(models, optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{OPTIMIZER}.{optimizer_name}.{name}.{key}"] = value
    return state


def _names_of_stages(state: Mapping[str, Tensor], stages: ProcessGroup | None) -> set[str]:
    """The names of this rank's tensors and of those that the other stages hold."""
    if stages is None:
        return set(state)
    return {name for held in gather_objects(list(state), stages) for name in held}


def _make_moments(
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    stored: Mapping[str, TensorStorageMetadata],
    elsewhere: AbstractSet[str],
) -> dict[str, tuple[Optimizer, nn.Parameter, str, Tensor]]:
    """Memory for every stored moment, and where it belongs.

    Built from what is stored, since an optimizer that has not stepped knows nothing of its state.

    Args:
        models: See `load_tensors`.
        optimizers: See `load_tensors`.
        stored: What the folder holds.
        elsewhere: Names of parameters whose moments belong to other stages.
    """
    owners = {
        f"{OPTIMIZER}.{optimizer_name}.{name}": (optimizer, parameter)
        for optimizer_name, optimizer in optimizers.items()
        for name, parameter in _named_parameters(models, optimizer)
    }
    moments: dict[str, tuple[Optimizer, nn.Parameter, str, Tensor]] = {}
    homeless: list[str] = []
    for name, metadata in stored.items():
        owner, _, key = name.rpartition(".")
        if owner in owners:
            optimizer, parameter = owners[owner]
            moments[name] = (optimizer, parameter, key, _like(metadata, parameter, optimizer))
        elif optimizers and name.startswith(f"{OPTIMIZER}.") and not _is_of(owner, elsewhere):
            homeless.append(name)
    if homeless:
        raise CheckpointError(
            f"the optimizer has no parameter for what was saved: {_listed(homeless)}. "
            "To fix: train the same parameters as the run that saved"
        )
    return moments


def _is_of(owner: str, parameters: AbstractSet[str]) -> bool:
    """Whether `optimizer.<its name>.<parameter>` is of one of the parameters."""
    _, _, named = owner.removeprefix(f"{OPTIMIZER}.").partition(".")
    return named in parameters


def _like(metadata: TensorStorageMetadata, parameter: nn.Parameter, optimizer: Optimizer) -> Tensor:
    dtype = metadata.properties.dtype
    if metadata.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    # A count of steps: beside the parameter where one kernel reads it, else on the CPU.
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.zeros(metadata.size, dtype=dtype, device=parameter.device if is_fused else "cpu")


def _check_model_names(held: AbstractSet[str], saved: AbstractSet[str]) -> None:
    missing, left_over = sorted(held - saved), sorted(saved - held)
    if missing or left_over:
        parts = [f"it lacks {_listed(missing)}"] if missing else []
        parts += [f"it holds {_listed(left_over)} too"] if left_over else []
        raise CheckpointError(f"the checkpoint is of another model: {'; '.join(parts)}")


def _check_shapes(state: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]) -> None:
    differing = [
        f"{name} is {list(stored[name].size)}, not {list(tensor.shape)}"
        for name, tensor in state.items()
        if stored[name].size != tensor.shape
    ]
    if differing:
        raise CheckpointError(f"the checkpoint has other shapes: {_listed(differing)}")


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return ", ".join(found[:MAX_LISTED]) + more


def _reasons(error: CheckpointException) -> str:
    failures: dict[int, Any] = error.failures
    texts = [f"rank {rank}: {caught[0]}" for rank, caught in sorted(failures.items())]
    return "; ".join(dict.fromkeys(texts))
