"""One model from configuration to sharded weights, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Final, TypeVar, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig, PreTrainedModel

from omnilit.config import (
    AcceleratorConfig,
    FSDPConfig,
    LoraArguments,
    OffloadConfig,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.config.invariance_rules import SPLITS, invariance_problems
from omnilit.config.lora_rules import lora_problems
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.logging import get_logger
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.blocks import check_basic, decoder_blocks, sharding_units
from omnilit.models.build import build_meta
from omnilit.models.compilation import Compilation, compile_blocks
from omnilit.models.experts import spread_experts
from omnilit.models.fit import check_fit
from omnilit.models.flops import ModelFlops, count_adapter_flops, count_flops
from omnilit.models.head import ForwardOutput
from omnilit.models.init_device import build_initial
from omnilit.models.lora import AdaptedModel, AdapterPlan, adapt, fill_adapters, plan_adapters
from omnilit.models.media.fit import refuse_split, refuse_spread, refuse_unbalanced
from omnilit.models.media.flops import MediaFlops
from omnilit.models.media.ranks import MediaRanks
from omnilit.models.recompute import enable_recomputation
from omnilit.models.sequence import split_attention
from omnilit.models.tensor_parallel import fit_kernels, split_model
from omnilit.models.towers import Towers, language_part
from omnilit.models.weights import Delivery, gather_weights, load_buffers, load_weights
from omnilit.modules.pipelined import Part, PipelinedModel, cut_into_parts, output_policy
from omnilit.modules.precision import Precision
from omnilit.parallel.fsdp import shard_experts, shard_model
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.offload import ActivationOffload
from omnilit.types import MicroBatch

log = get_logger(__name__)
GIB: Final = 2**30
T = TypeVar("T")


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
        accelerator: From the strategy; sizes, and that it is DDP, stand in the meshes.
        is_resume: A checkpoint will bring the weights.
        basic_modules: Names of module classes to shard on their own, beside the model's blocks.
        lora: Adapters that are trained in place of the model.
        takes_media: Rows hold images, videos or sounds beside tokens.
        balances_media: Data ranks look at images and videos of each other's rows.
    """

    config: PretrainedConfig
    weights_path: str | None
    strict: bool
    trust_remote_code: bool
    ops: OpsImplementationConfig
    given: frozenset[str]
    train: TrainingArguments
    accelerator: AcceleratorConfig
    is_resume: bool
    basic_modules: Sequence[str] = ()
    lora: LoraArguments = LoraArguments()
    takes_media: bool = False
    balances_media: bool = False

    @property
    def fsdp(self) -> FSDPConfig:
        """Precision and sharding."""
        return self.accelerator.fsdp_config

    @property
    def offload(self) -> OffloadConfig:
        """Whether activations leave the device between forward and backward."""
        return self.accelerator.offload_config


@dataclass(frozen=True, slots=True)
class AssembledModel:
    """A model ready to train, with what was bound to it and what it costs, where that is known.

    `sequence` are the ranks that hold parts of the same sequences; None where each is whole.
    `pipeline` runs its stages, where it has several; `model` is then what this rank holds of it.
    `adapted` are the adapters that are trained in its place, where there are any, and `towers` are
    its parts that see and hear, which cost `media_flops`.
    """

    model: PreTrainedModel
    kernels: KernelSet
    binding: Binding
    precision: Precision
    flops: ModelFlops | None
    compilation: Compilation | None = None
    activations: ActivationOffload | None = None
    sequence: ProcessGroup | None = None
    pipeline: PipelinedModel | None = None
    adapted: AdaptedModel | None = None
    towers: Towers | None = None
    media_flops: MediaFlops | None = None

    @property
    def parts(self) -> list[PreTrainedModel]:
        """What runs on this rank: the model, or its stages."""
        return [self.model] if self.pipeline is None else self.pipeline.models

    @property
    def stages(self) -> ProcessGroup | None:
        """The ranks that hold the model's other stages; None where it has one."""
        return None if self.pipeline is None else self.pipeline.group

    def read_on_last(self, read: Callable[[], T]) -> T:
        """What a function gives where losses come out, on every rank; all stages call."""
        if self.pipeline is None:
            return read()
        value = read() if self.pipeline.has_last else None
        return cast("T", self.pipeline.from_last(value))

    def gather_weights(self) -> dict[str, Tensor]:
        """The full parameters and saved buffers on the CPU of rank 0; every rank calls."""
        return gather_weights(self.model, stages=self.stages)

    def verify_step(self) -> None:
        """Check after a step that what was bound was called, and say once what was compiled.

        Raises:
            KernelError: A kernel was bound and the model went past it.
            TrainingError: Blocks were to be compiled, and nothing was.
        """
        total = dict if self.pipeline is None else self.pipeline.add_up
        self.binding.verify_called(total)
        if self.adapted is not None:
            self.adapted.verify_called(total)
        if self.compilation is not None:
            self.compilation.report()
        if self.activations is not None:
            self.activations.report()

    def forward(self, batch: MicroBatch) -> ForwardOutput:
        """Losses of the supervised tokens, and the router's balance loss where there is one.

        In a pipeline it goes on from what the stages before the last one came to.

        Raises:
            OmniError: In a pipeline, of other tokens than those of the micro-batch that runs.
        """
        model, states, activations = self.model, (), self.activations
        if self.pipeline is not None:  # which moves the activations of each stage itself
            states, activations = self.pipeline.states_of(batch), None
            model = self.pipeline.last_model
        with nullcontext() if activations is None else activations.saving():
            return self.binding.forward(model, batch, sequence=self.sequence, states=states)

    def next_logits(self, batch: MicroBatch, positions: Tensor) -> Tensor | None:
        """Logits [R, V] of the tokens behind R positions of a row; every rank of it calls.

        Args:
            batch: On the model's device.
            positions: Places in the part of the row that is here, int64 [R]; R may be 0.

        Returns:
            None where a pipeline's last stage is on another rank.
        """
        pipeline = self.pipeline
        if pipeline is None:
            return self.binding.next_logits(self.model, batch, positions)
        found: list[Tensor] = []

        def on_last(batch: MicroBatch) -> Tensor:
            model, states = pipeline.last_model, pipeline.states_of(batch)
            found.append(self.binding.next_logits(model, batch, positions, states))
            return positions.new_zeros(1)

        pipeline.evaluate(batch, on_last)
        return found[0] if found else None


def assemble(request: ModelRequest, *, topology: Topology, machine: Machine) -> AssembledModel:
    """Build, bind, shard and fill one model; every rank calls.

    Raises:
        ConfigError: The model, its kernels or its weights cannot be used as asked.
    """
    assembled = assemble_shards(request, topology=topology, machine=machine)
    plan = None if assembled.adapted is None else assembled.adapted.plan
    _fill(assembled.model, request, topology, plan)
    log.info("precision: %s", assembled.precision)
    return assembled


def assemble_shards(
    request: ModelRequest, *, topology: Topology, machine: Machine
) -> AssembledModel:
    """Build, bind and shard one model, without memory where it is built on meta; every rank calls.

    The order is fixed: kernels are bound to plain modules, those are split with what was bound and
    experts that are spread over ranks compute with it; then the model is cut into stages, and
    attention works across the ranks of a sequence; recomputation wraps that, what is compiled holds
    all of it, sharding comes last before memory is taken, and weights go straight into the shards.

    Raises:
        ConfigError: The model or its kernels cannot be used as asked.
    """
    per_rank = request.accelerator.pp_stages_per_rank
    check_fit(request.config, topology.sizes, stages_per_rank=per_rank)
    train = request.train
    precision = Precision.of(request.fsdp.mixed_precision, machine)
    model = build_initial(
        request.config,
        init_device=train.init_device,
        trains_on=topology.device.type,
        dtype=precision.master,
        trust_remote_code=request.trust_remote_code,
    )
    check_basic(model, request.basic_modules)
    flops = count_flops(model)
    sizes = topology.sizes
    kernels = _choose_kernels(request, sizes, machine)
    binding = bind_kernels(model, kernels, takes_media=request.takes_media)
    towers, media_flops = _ready_towers(model, request, binding, topology)
    adapted = _adapt(model, request, topology, precision)
    if flops is not None and adapted is not None:
        flops = count_adapter_flops(flops, model, adapted.plan)
    split_model(model, topology.tp, with_experts=sizes.ep_size == 1)
    experts = _spread_experts(model, topology)  # of all layers: a stage may have none
    if adapted is not None:
        adapted.add_factors(model, precision.master)
    parts = cut_into_parts(model, topology, request.accelerator)
    split_attention(model, topology, request.accelerator)
    enable_recomputation(model, train.gradient_checkpointing)
    blocks = decoder_blocks(language_part(model))
    compilation = compile_blocks(blocks, machine) if train.enable_compile else None
    held = [module for module in model.modules() if module in experts]
    _shard_experts(held, request.fsdp, precision, topology)
    _shard(model, parts, request, precision, topology)
    activations = _offload_activations(model, request.offload, topology)
    pipeline = _run_stages(parts, request, topology, binding, precision, activations)
    return AssembledModel(
        model=model,
        kernels=kernels,
        binding=binding,
        precision=precision,
        flops=flops,
        compilation=compilation,
        activations=activations,
        sequence=topology.sequence_group,
        pipeline=pipeline,
        adapted=adapted,
        towers=towers,
        media_flops=media_flops,
    )


def _ready_towers(
    model: PreTrainedModel, request: ModelRequest, binding: Binding, topology: Topology
) -> tuple[Towers | None, MediaFlops | None]:
    """Leave towers as they are where the run asks for it; returns where they lie, and their cost.

    Raises:
        ConfigError: The model has no such tower, none whose work can be shared, or ranks cannot
            agree on what of it runs.
    """
    if binding.media is None:
        return None, None
    if request.balances_media:
        refuse_unbalanced(model)
    if topology.data_size > 1:
        refuse_spread(model)
    if topology.sequence_size > 1:
        refuse_split(model)
    binding.media.is_shared = topology.sizes.world_size > 1
    binding.media.ranks = MediaRanks.of(topology, is_balanced=request.balances_media)
    towers, train = Towers.of(model), request.train
    towers.freeze(model, vision=train.freeze_vit, audio=train.freeze_audio_tower)
    return towers, MediaFlops.of(model)


def _shard(
    model: PreTrainedModel,
    parts: Sequence[Part],
    request: ModelRequest,
    precision: Precision,
    topology: Topology,
) -> None:
    units = sharding_units(model, leaves_rest=not parts, basic=request.basic_modules)
    shard_model(
        *([part.model for part in parts] or [model]),
        units=units.modules,
        last=units.last,
        mesh=topology.fsdp,
        policy=output_policy(precision.policy, parts),
        reshard_after_forward=request.fsdp.reshard_after_forward,
        forward_prefetch=request.fsdp.forward_prefetch,
        offload=request.fsdp.offload,
    )


def _adapt(
    model: PreTrainedModel, request: ModelRequest, topology: Topology, precision: Precision
) -> AdaptedModel | None:
    """Bind the adapters that the run asks for; they compute once their factors are there."""
    lora, recompute = request.lora, request.train.gradient_checkpointing
    problems = lora_problems(
        lora,
        model_path=request.weights_path,
        tp_size=topology.sizes.tp_size,
        is_reentrant=recompute.enable and recompute.enable_reentrant,
    )
    if problems:
        raise ConfigError.of(problems)
    if not lora.enable:
        return None
    blueprint = build_meta(
        request.config, dtype=precision.master, trust_remote_code=request.trust_remote_code
    )
    return adapt(model, plan_adapters(blueprint, lora), compute=precision.compute)


def _run_stages(
    parts: Sequence[Part],
    request: ModelRequest,
    topology: Topology,
    binding: Binding,
    precision: Precision,
    activations: ActivationOffload | None,
) -> PipelinedModel | None:
    if not parts:
        return None
    return PipelinedModel(
        parts,
        binding=binding,
        topology=topology,
        config=request.accelerator,
        dtype=precision.compute,
        saving=nullcontext if activations is None else activations.saving,
    )


def _offload_activations(
    model: PreTrainedModel, config: OffloadConfig, topology: Topology
) -> ActivationOffload | None:
    if not config.enable_activation:
        return None
    limit = int(config.activation_gpu_limit * GIB)
    if topology.device.type == "cpu":
        log.info("activations: a CPU's leave for other memory of the same kind; none is saved")
    return ActivationOffload.of(model, limit=limit, device=topology.device)


def _choose_kernels(request: ModelRequest, sizes: ParallelSizes, machine: Machine) -> KernelSet:
    train = request.train
    splits = {path: getattr(sizes, path.rpartition(".")[2]) for path in SPLITS}
    is_invariant, is_compiled = train.enable_batch_invariant_mode, train.enable_compile
    if problems := invariance_problems(is_on=is_invariant, is_compiled=is_compiled, sizes=splits):
        raise ConfigError.of(problems)
    kernels = resolve_kernels(
        request.ops, given=request.given, machine=machine, is_invariant=is_invariant
    )
    return fit_kernels(kernels, tp_size=sizes.tp_size, is_compiled=is_compiled)


def _spread_experts(model: PreTrainedModel, topology: Topology) -> list[nn.Module]:
    """Split the experts where the run asks for it; returns the modules that hold them."""
    if topology.sparse is None:
        return []
    return spread_experts(model, ep_mesh=topology.sparse["ep"], tp_mesh=topology.tp)


def _shard_experts(
    experts: list[nn.Module], fsdp: FSDPConfig, precision: Precision, topology: Topology
) -> None:
    if topology.efsdp is None:
        return
    shard_experts(
        experts,
        mesh=topology.efsdp,
        policy=precision.policy,
        reshard_after_forward=fsdp.reshard_after_forward,
        offload=fsdp.offload,
    )


def _fill(
    model: PreTrainedModel, request: ModelRequest, topology: Topology, plan: AdapterPlan | None
) -> None:
    """Give the shards memory and values; those that a checkpoint brings are left undefined."""
    delivery = Delivery(
        from_rank0=request.train.broadcast_model_weights_from_rank0,
        max_bytes=int(request.fsdp.max_load_broadcast_size * GIB),
        is_offloaded=request.fsdp.offload,
    )
    if request.is_resume and plan is None:  # else it brings the adapters alone
        load_buffers(
            model,
            request.config,
            device=topology.device,
            trust_remote_code=request.trust_remote_code,
            delivery=delivery,
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
        delivery=delivery,
    )
    if plan is not None:
        if request.is_resume:  # the folder that the run started from need not be there any more
            plan = replace(plan, arguments=replace(plan.arguments, adapter_path=None))
        fill_adapters(model, plan, seed=request.train.seed)
