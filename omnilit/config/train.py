"""`train`: everything about the run that is neither model nor data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omnilit.config.accelerator import AcceleratorConfig
from omnilit.config.checkpoint import CheckpointConfig
from omnilit.config.optimizer import OptimizerConfig


@dataclass(frozen=True)
class WandbConfig:
    """Logging to Weights & Biases.

    Args:
        enable: Log there.
        project: Name of the project.
        name: Name of the run; null lets the service choose one.
        id: Id of an earlier run to go on with; null is a new one, or that of the run directory
            where `load_path` goes on from there.
        group: Runs of one group are shown together.
        tags: Words to find the run by.
        entity: User or team that the project belongs to; null is the account's default.
    """

    enable: bool = False
    project: str = "omnilit"
    name: str | None = None
    id: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    entity: str | None = None


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps by torch's profiler.

    Args:
        enable: Record a trace.
        start_step: First step recorded; the one before warms the profiler up.
        end_step: Step before which recording ends.
        trace_dir: Folder of the traces, relative to the working directory.
        record_shapes: Record the shapes of inputs.
        profile_memory: Record what is allocated and freed.
        with_stack: Record where in the source each operation was called.
        rank0_only: Record on rank 0 only.
    """

    enable: bool = False
    start_step: int = 1
    end_step: int = 2
    trace_dir: str = "./trace"
    record_shapes: bool = True
    profile_memory: bool = True
    with_stack: bool = True
    rank0_only: bool = True


@dataclass(frozen=True)
class GradientCheckpointingConfig:
    """Recomputing activations in backward in place of storing them.

    Args:
        enable: Recompute each decoder block.
        debug: Record operations, so that a block that recomputes differently says where.
        enable_reentrant: Use torch's older, reentrant form; refused where it would lose gradients.
    """

    enable: bool = True
    debug: bool = False
    enable_reentrant: bool = False


@dataclass(frozen=True)
class TrainingArguments:
    """The run: batches, length, evaluation, and the groups below.

    Args:
        dyn_bsz: Pack samples into micro-batches of a fixed number of tokens, without padding.
        micro_batch_size: Samples of a micro-batch; with `dyn_bsz` its tokens in multiples of
            `data.max_seq_len`.
        global_batch_size: The same for a whole step over all ranks; null is one micro-batch a
            data-parallel rank.
        num_train_epochs: Epochs of `data.train_size` tokens each.
        pad_to_length: Fill every packed micro-batch to its full number of tokens.
        bsz_warmup_ratio: Share of the steps in which the micro-batch grows to its full size.
        bsz_warmup_init_mbtoken: Tokens of a micro-batch at the start of that growth.
        init_device: Where the model is built before its weights are there: meta takes no memory;
            elsewhere each rank first holds the whole model.
        broadcast_model_weights_from_rank0: Rank 0 alone reads the weights and sends them; false
            lets each rank read its own part.
        enable_full_determinism: Make two runs equal to the bit, at a cost in speed.
        enable_batch_invariant_mode: Make a sample's logits independent of its batch.
        empty_cache_steps: Steps between two releases of the device's cached memory; 0 for none.
        gc_steps: Steps between two garbage collections on all ranks together; 0 leaves Python's
            own schedule on.
        eval_steps: Steps between two evaluations; 0 for none.
        eval_epochs: Epochs between two evaluations, where there is an evaluation set; 0 for none.
        eval_samples: Prompts of the evaluation data that are completed at each evaluation, for
            people to read; 0 for none.
        eval_samples_max_tokens: Tokens of such a completion at most; each is one forward pass.
        log_layer_grad_norms_steps: Steps between two lines of metrics with the gradient norm of
            every decoder block; 0 for none.
        log_expert_load_steps: Steps between two lines of metrics with the share of tokens that each
            expert of each layer is sent; 0 for none.
        seed: The one seed, of initialisation, dropout and the order of the data.
        enable_compile: Compile each decoder block.
        max_steps: Most steps of an epoch; null for no cap.
        freeze_vit: Train no parameter of the vision tower.
        freeze_audio_tower: Train no parameter of the audio tower.
        vit_lr: Highest learning rate of the vision tower.
        optimizer: The update rule and its learning rate.
        wandb: Logging to Weights & Biases.
        profile: A trace of some steps.
        gradient_checkpointing: Recomputing activations.
        accelerator: How the model is spread over devices.
        checkpoint: Saving, resuming and exporting.
    """

    dyn_bsz: bool = True
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    num_train_epochs: int = 1
    pad_to_length: bool = False
    bsz_warmup_ratio: float = 0.0
    bsz_warmup_init_mbtoken: int = 200
    init_device: Literal["cpu", "cuda", "meta", "npu"] = "meta"
    broadcast_model_weights_from_rank0: bool = True
    enable_full_determinism: bool = False
    enable_batch_invariant_mode: bool = False
    empty_cache_steps: int = 500
    gc_steps: int = 500
    eval_steps: int = 0
    eval_epochs: int = 1
    eval_samples: int = 0
    eval_samples_max_tokens: int = 64
    log_layer_grad_norms_steps: int = 0
    log_expert_load_steps: int = 0
    seed: int = 42
    enable_compile: bool = False
    max_steps: int | None = None
    freeze_vit: bool = False
    freeze_audio_tower: bool = False
    vit_lr: float = 1e-6
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    gradient_checkpointing: GradientCheckpointingConfig = field(
        default_factory=GradientCheckpointingConfig
    )
    accelerator: AcceleratorConfig = field(default_factory=AcceleratorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
