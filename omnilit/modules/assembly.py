"""One model from configuration to sharded weights, in the one order that works."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from omnilit.config import FSDPConfig, OpsImplementationConfig, TrainingArguments
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.logging import get_logger
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.models.compilation import Compilation, compile_blocks
from omnilit.models.fit import check_fit
from omnilit.models.flops import ModelFlops, count_flops
from omnilit.models.head import ForwardOutput
from omnilit.models.init_device import build_initial
from omnilit.models.recompute import enable_recomputation
from omnilit.models.tensor_parallel import fit_kernels, split_model
from omnilit.models.weights import load_buffers, load_weights
from omnilit.modules.precision import Precision
from omnilit.parallel.fsdp import shard_model
from omnilit.parallel.mesh import Topology
from omnilit.types import MicroBatch

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What one model is made from; a module that holds two models makes two requests.

    Args:
        config: The model's configuration as read; the model gets a copy.
        weights_path: Folder with safetensors, or None for random weights.
        strict: Refuse weights that do not name every parameter exactly once.
        trust_remote_code: Run code that comes with the model's files.
        ops: Which kernel runs each operation.
        given: Fields of `ops` that were given.
        train: The `train` group: seed and recomputation.
        fsdp: Precision and sharding, from the strategy; that it is DDP stands in the mesh.
        is_resume: A checkpoint will bring the weights.
    """

    config: PretrainedConfig
    weights_path: str | None
    strict: bool
    trust_remote_code: bool
    ops: OpsImplementationConfig
    given: frozenset[str]
    train: TrainingArguments
    fsdp: FSDPConfig
    is_resume: bool


@dataclass(frozen=True, slots=True)
class AssembledModel:
    """A model ready to train, with what was bound to it and what it costs, where that is known."""

    model: PreTrainedModel
    kernels: KernelSet
    binding: Binding
    precision: Precision
    flops: ModelFlops | None
    compilation: Compilation | None = None

    def verify_step(self) -> None:
        """Check after a step that what was bound was called, and say once what was compiled.

        Raises:
            KernelError: A kernel was bound and the model went past it.
            TrainingError: Blocks were to be compiled, and nothing was.
        """
        self.binding.verify_called()
        if self.compilation is not None:
            self.compilation.report()

    def forward(self, batch: MicroBatch) -> ForwardOutput:
        """Losses of the supervised tokens, and the router's balance loss where there is one."""
        return self.binding.head.forward(self.model, batch)


def assemble(request: ModelRequest, *, topology: Topology, machine: Machine) -> AssembledModel:
    """Build, bind, shard and fill one model; every rank calls.

    The order is fixed: kernels are bound to plain modules, those are split with what was bound,
    recomputation wraps it, what is compiled holds all of that, sharding comes last before memory
    is taken, and weights go straight into the shards.

    Raises:
        ConfigError: The model, its kernels or its weights cannot be used as asked.
    """
    check_fit(request.config, topology.sizes)
    train = request.train
    precision = Precision.of(request.fsdp.mixed_precision, machine)
    model = build_initial(
        request.config,
        init_device=train.init_device,
        trains_on=topology.device.type,
        dtype=precision.master,
        trust_remote_code=request.trust_remote_code,
    )
    flops = count_flops(model)
    kernels = resolve_kernels(request.ops, given=request.given, machine=machine)
    sizes = topology.sizes
    kernels = fit_kernels(kernels, tp_size=sizes.tp_size, is_compiled=train.enable_compile)
    binding = bind_kernels(model, kernels)
    split_model(model, topology.tp, with_experts=sizes.ep_size == 1)
    enable_recomputation(model, train.gradient_checkpointing)
    blocks = decoder_blocks(model)
    compilation = compile_blocks(blocks, machine) if train.enable_compile else None
    shard_model(
        model,
        units=blocks,
        mesh=topology.fsdp,
        policy=precision.policy,
        reshard_after_forward=request.fsdp.reshard_after_forward,
        forward_prefetch=request.fsdp.forward_prefetch,
    )
    _fill(model, request, topology)
    log.info("precision: %s", precision)
    return AssembledModel(model, kernels, binding, precision, flops, compilation)


def _fill(model: PreTrainedModel, request: ModelRequest, topology: Topology) -> None:
    """Give the shards memory and values; those that a checkpoint brings are left undefined."""
    from_rank0 = request.train.broadcast_model_weights_from_rank0
    if request.is_resume:
        load_buffers(
            model,
            request.config,
            device=topology.device,
            trust_remote_code=request.trust_remote_code,
            from_rank0=from_rank0,
        )
        return
    load_weights(
        model,
        request.config,
        path=request.weights_path,
        seed=request.train.seed,
        device=topology.device,
        strict=request.strict,
        trust_remote_code=request.trust_remote_code,
        from_rank0=from_rank0,
    )
