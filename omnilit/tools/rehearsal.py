"""What one rank of a run would hold and send, built by what training builds with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from omnilit.cli.fitting import read_config
from omnilit.cli.plan import build, read
from omnilit.cli.raw import Command
from omnilit.config import LoraArguments, OpsImplementationConfig, TrainingArguments
from omnilit.config.data import micro_batch_tokens
from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.config.status import load_status, refuse_later
from omnilit.config.view import View
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.models.traffic import ModelWidths, StepShape, Traffic, step_traffic
from omnilit.modules.assembly import AssembledModel, ModelRequest, assemble_shards
from omnilit.optim.build import build_optimizer
from omnilit.parallel.local import local_part
from omnilit.parallel.mesh import Topology
from omnilit.parallel.pretend import pretend_ranks
from omnilit.parallel.shards import HeldParameter, HeldUnit, held_units


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one rank would hold and send.

    Args:
        rank: Which.
        model_type: As transformers names it.
        sizes: Of all axes, resolved.
        units: What it holds of the parameters.
        moment_bytes: Of the optimizer's state.
        gradient_bytes: Of the gradients once they are reduced.
        unreduced_bytes: Of the whole gradients that add up before; 0 where those of each
            micro-batch are reduced, block by block.
        is_offloaded: What it holds is in host memory.
        step: What a step is made of.
        traffic: What it sends in a step.
    """

    rank: int
    model_type: str
    sizes: ParallelSizes
    units: tuple[HeldUnit, ...]
    moment_bytes: int
    gradient_bytes: int
    unreduced_bytes: int
    is_offloaded: bool
    step: StepShape
    traffic: tuple[Traffic, ...]

    @property
    def parameters(self) -> list[HeldParameter]:
        """All that it holds a part of."""
        return [held for unit in self.units for held in unit.parameters]

    @property
    def parameter_bytes(self) -> int:
        """Of its own parts."""
        return sum(held.own * held.itemsize for held in self.parameters)


def rehearse_command(command: Command, *, world_size: int, rank: int) -> Rehearsal:
    """Build and shard the model of a configuration for one rank, and count what that comes to.

    Args:
        command: Configuration files and overrides; keys, types and sizes are good.
        world_size: Number of ranks.
        rank: Which of them.

    Raises:
        ConfigError: What is asked for is not there yet, or the model cannot be used so.
    """
    reading = read(command)
    view = View.of(reading.checked, list(reading.fields), world_size=world_size)
    later = refuse_later(view, load_status())
    if problems := [problem for problem in later if problem.key.startswith("train.")]:
        raise ConfigError.of(problems)
    request = _request(view)
    sizes = view["train.micro_batch_size"], view["data.max_seq_len"]
    tokens = micro_batch_tokens(*sizes, view["data.data_type"])
    return rehearse(request, world_size=world_size, rank=rank, tokens=tokens)


def _request(view: View) -> ModelRequest:
    """What a run would make its model from, but for what needs the real machine or weights."""
    train = build(TrainingArguments, "train", view)
    has_code = view["model.trust_remote_code"]
    return ModelRequest(
        config=read_config(view),
        weights_path=view["model.model_path"],
        strict=True,
        trust_remote_code=has_code,
        ops=OpsImplementationConfig(preset="eager"),
        given=frozenset(),
        train=replace(train, init_device="meta", enable_compile=False),
        accelerator=train.accelerator,
        is_resume=False,
        basic_modules=tuple(view["model.basic_modules"] or ()),
        lora=build(LoraArguments, "model.lora", view),
    )


def rehearse(request: ModelRequest, *, world_size: int, rank: int, tokens: int) -> Rehearsal:
    """Assemble one rank's part of a model on the meta device and count it.

    Args:
        request: On the meta device, with kernels that run anywhere.
        world_size: Number of ranks.
        rank: Which of them.
        tokens: Of a micro-batch.

    Raises:
        ConfigError: The sizes fit neither the ranks nor the model.
    """
    sizes = ParallelSizes.of(request.train.accelerator)
    machine = Machine.detect("cpu")
    with pretend_ranks(world_size, rank=rank):
        topology = Topology.build(sizes, torch.device("cpu"))
        assembled = assemble_shards(request, topology=topology, machine=machine)
        units = tuple(unit for part in assembled.parts for unit in held_units(part))
        gradients = _set_gradients(assembled.model)
        # which parameters decay changes no byte, and of a pattern other stages may have the match
        plain = replace(request.train.optimizer, no_decay_modules=[], no_decay_params=[])
        optimizer = build_optimizer(assembled.model, plain)
        optimizer.step()
        step = _step_shape(request, assembled, topology.sizes, tokens)
        traffic = step_traffic(
            units,
            ModelWidths.of(assembled.model, topology.sizes),
            topology.sizes,
            step,
            stage=topology.pp_rank,
        )
        summed = sum(unit.summed for unit in units)
        return Rehearsal(
            rank=rank,
            model_type=request.config.model_type,
            sizes=topology.sizes,
            units=units,
            moment_bytes=_state_bytes(optimizer),
            gradient_bytes=gradients,
            unreduced_bytes=summed * step.reduce_bytes * (step.reductions < step.micro_batches),
            is_offloaded=request.fsdp.offload,
            step=step,
            traffic=tuple(traffic),
        )


def _set_gradients(model: nn.Module) -> int:
    """Give every parameter a gradient like itself, as the reduction leaves it; returns bytes."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            total += _own_bytes(parameter.grad)
    return total


def _state_bytes(optimizer: Optimizer) -> int:
    """Of all moments, and of whatever else the optimizer keeps for a parameter."""
    states = optimizer.state.values()
    return sum(_own_bytes(value) for state in states for value in state.values())


def _own_bytes(value: object) -> int:
    if not isinstance(value, Tensor):
        return 0
    return local_part(value).nbytes


def _step_shape(
    request: ModelRequest, assembled: AssembledModel, sizes: ParallelSizes, tokens: int
) -> StepShape:
    train, policy = request.train, assembled.precision.policy
    at_once = train.micro_batch_size * sizes.data_size
    compute = assembled.precision.compute
    micro_batches = (train.global_batch_size or at_once) // at_once
    return StepShape(
        micro_batches=micro_batches,
        tokens=tokens,
        compute_bytes=compute.itemsize,
        reduce_bytes=(policy.reduce_dtype or compute).itemsize,
        is_recomputed=train.gradient_checkpointing.enable,
        keeps_gathered=not request.fsdp.reshard_after_backward,
        reductions=micro_batches if request.fsdp.sync_each_micro_batch else 1,
        is_ring=request.accelerator.cp_method == "ring",
        stages_per_rank=request.accelerator.pp_stages_per_rank,
    )
