"""The base of every task: one model, built in one order, trained on exact means."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from typing_extensions import override

from omnilit.checkpoint.data_state import seed_random
from omnilit.checkpoint.hf import choose_export_dtype
from omnilit.checkpoint.shard_files import ShardFiles
from omnilit.checkpoint.whole_files import WholeFiles
from omnilit.config import (
    LoraArguments,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.data.prompts import PromptSet
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import changed_fields
from omnilit.logging import get_logger
from omnilit.models.architecture import choose_language_model
from omnilit.models.bind import Binding
from omnilit.models.build import (
    check_tokenizer,
    folder_beside,
    load_generation_config,
    load_model_config,
    load_tokenizer,
    stop_tokens,
)
from omnilit.models.class_labels import refuse_classifier
from omnilit.models.lora.saved import describe_adapters, refuse_other_adapters
from omnilit.modules.assembly import AssembledModel, ModelRequest, assemble
from omnilit.modules.availability import refuse_arguments, refuse_train_settings
from omnilit.modules.completions import complete_together
from omnilit.modules.exporting import export_together, plan_files
from omnilit.modules.meter import TermMeter, Totals
from omnilit.modules.step import StepAccount
from omnilit.modules.trainer_view import accelerator_of, topology_of
from omnilit.optim.build import build_optimizer, refuse_other_type
from omnilit.optim.schedules import AbsoluteSchedule
from omnilit.parallel.collectives import sum_over
from omnilit.parallel.grad_norm import clip_gradients
from omnilit.parallel.mesh import Topology
from omnilit.types import Confusion, LossTerm, MicroBatch, StepResult, StepWindow

log = get_logger(__name__)


class OmniModule(LightningModule):
    """Builds one model, binds kernels to it, shards it, and trains it on exact means.

    A task subclasses it and says what the loss is made of in `loss_terms`. Everything else is
    shared: the mean of each term is over all its targets of the whole optimizer step, whatever
    the number of ranks and micro-batches.

    Args:
        config_path: Folder or file with the model's Hugging Face configuration; default:
            `model_path`.
        model_path: Folder with safetensors weights; left out, weights are random.
        tokenizer_path: Folder of the tokenizer; default: `config_path`.
        safetensor_idx_path: Index of the files of an export; default: that of `model_path`.
        foundation: Extra settings of a foundation model.
        encoders: Encoders by modality.
        decoders: Decoders by modality.
        input_encoder: Which side encodes input images.
        output_encoder: Which side encodes output images.
        encode_target: Encode the training targets with the decoder.
        basic_modules: Names of module classes to shard on their own, beside the model's blocks.
        lora: Adapters to train in place of the model.
        ops_implementation: Which kernel runs each operation.
        trust_remote_code: Run code that comes with the model's files.
        strict: Refuse weights that do not name every parameter exactly once.
        train: The `train` group; the command line fills it in.
    """

    data_type: ClassVar[str | None] = None  # the only `data.data_type` that the task trains on
    takes_media: ClassVar[bool] = False  # whether it trains what sees and hears

    def __init__(
        self,
        *,
        config_path: str | None = None,
        model_path: str | None = None,
        tokenizer_path: str | None = None,
        safetensor_idx_path: str | None = None,
        foundation: dict[str, str] = {},  # noqa: B006 - the reference's default, never changed
        encoders: dict[str, Any] = {},  # noqa: B006
        decoders: dict[str, Any] = {},  # noqa: B006
        input_encoder: Literal["encoder", "decoder"] = "encoder",
        output_encoder: Literal["encoder", "decoder"] = "decoder",
        encode_target: bool = False,
        basic_modules: list[str] | None = [],  # noqa: B006
        lora: LoraArguments = LoraArguments(),
        ops_implementation: OpsImplementationConfig = OpsImplementationConfig(),
        trust_remote_code: bool = False,
        strict: bool = True,
        train: TrainingArguments = TrainingArguments(),
    ) -> None:
        super().__init__()
        later = {
            "foundation": foundation,
            "encoders": encoders,
            "decoders": decoders,
            "input_encoder": input_encoder,
            "output_encoder": output_encoder,
            "encode_target": encode_target,
        }
        refuse_arguments(OmniModule, "model", later)
        refuse_train_settings(train, type(self).__name__, takes_media=self.takes_media)
        self.config_path = config_path or model_path
        self.model_path = model_path
        self.tokenizer_path = tokenizer_path or folder_beside(self.config_path)
        self.ops_implementation = ops_implementation
        self.trust_remote_code = trust_remote_code
        self.strict = strict
        self.safetensor_idx_path = safetensor_idx_path
        self.basic_modules = tuple(basic_modules or ())
        self.lora = lora
        self.train_arguments = train
        self.given_kernels = changed_fields(ops_implementation)
        self.policy: AssembledModel | None = None
        self.model: torch.nn.Module | None = None
        self.step_result: StepResult | None = None
        self.eval_result: dict[str, float] | None = None
        self.eval_confusion: Confusion | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model_config: PretrainedConfig | None = None
        self._step, self._eval_meter = StepAccount(), TermMeter()

    # What a task may override

    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        """The loss of one micro-batch as named sums, each over targets that the batch counts.

        Args:
            batch: One packed micro-batch.

        Returns:
            By name; a term's weight in the step is its sum over the count of its targets in the
            whole step.
        """
        raise NotImplementedError

    def batch_flops(self, batch: MicroBatch) -> float | None:
        """Operations of training on one micro-batch; None where the model's layers are unknown.

        A task that runs a model more than once a micro-batch, or a further one, adds them up.
        """
        flops = self.assembled.flops
        return None if flops is None else flops.of_batch(batch)

    def parameter_part(self, name: str) -> str:
        """The optimizer group that a parameter belongs to, by its name in the model."""
        return "backbone"

    def part_rates(self) -> Mapping[str, float]:
        """Highest learning rates of optimizer groups that do not take `train.optimizer.lr`."""
        return {}

    # What the model is

    @property
    def topology(self) -> Topology:
        """The meshes of this run.

        Raises:
            ConfigError: The trainer has another strategy than `OmniStrategy`.
        """
        return topology_of(self.trainer)

    @property
    def model_config(self) -> PretrainedConfig:
        """The model's configuration as its files say it; never changed by what is bound."""
        if self._model_config is None:
            config = load_model_config(
                self.config_path, self.model_path, trust_remote_code=self.trust_remote_code
            )
            self._model_config = self._choose_model(config)
        return self._model_config

    def _choose_model(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration of the model that the task trains, by the one in the files."""
        refuse_classifier(config)
        choose_language_model(config)
        return config

    @property
    def processor(self) -> ProcessorMixin | None:
        """Prepares images, videos and sounds; None for text alone."""
        return None

    @property
    def shares_media(self) -> bool:
        """Whether data ranks look at images and videos of each other's rows."""
        return False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, checked against the model's vocabulary."""
        if self._tokenizer is None:
            if self.tokenizer_path is None:
                raise ConfigError(
                    key="model.tokenizer_path",
                    problem="neither tokenizer_path, config_path nor model_path is given",
                    fix="give the folder of the tokenizer",
                )
            tokenizer = load_tokenizer(
                self.tokenizer_path, trust_remote_code=self.trust_remote_code
            )
            check_tokenizer(tokenizer, self.model_config)
            self._tokenizer = tokenizer
        return self._tokenizer

    @cached_property
    def shard_files(self) -> ShardFiles | WholeFiles | None:
        """Which tensor of an export goes into which file; None where no index says it."""
        return plan_files(
            self.model_config,
            index_path=self.safetensor_idx_path,
            model_path=self.model_path,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def assembled(self) -> AssembledModel:
        """The model that is trained, with its kernels; there from `configure_model` on."""
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    @property
    def binding(self) -> Binding:
        """What was bound where."""
        return self.assembled.binding

    @override
    def configure_model(self) -> None:
        if self.policy is not None:
            return  # Lightning calls again before each fit and validate
        _ = self.shard_files  # an index that does not fit is told now, not with the first export
        self.policy = self._assemble(self._model_request())
        self.model = self.policy.model
        # dropout differs between data ranks; weights have random numbers of their own
        seed_random(seed=self.train_arguments.seed, step=0, data_rank=self.topology.data_rank)

    def _model_request(self) -> ModelRequest:
        """What the model that is trained is made from."""
        return ModelRequest(
            config=self.model_config,
            weights_path=self.model_path,
            strict=self.strict,
            trust_remote_code=self.trust_remote_code,
            ops=self.ops_implementation,
            given=self.given_kernels,
            train=self.train_arguments,
            accelerator=accelerator_of(self.trainer, self.train_arguments.accelerator),
            is_resume=self.trainer.ckpt_path is not None,
            basic_modules=self.basic_modules,
            lora=self.lora,
        )

    def _assemble(self, request: ModelRequest) -> AssembledModel:
        machine = Machine.detect(self.topology.device.type)
        return assemble(request, topology=self.topology, machine=machine)

    # Training

    @override
    def training_step(self, batch: MicroBatch | StepWindow, batch_idx: int) -> Tensor:
        pipeline = self.assembled.pipeline
        if isinstance(batch, MicroBatch):
            if pipeline is not None:
                raise ConfigError(
                    key="train.accelerator.pp_size",
                    problem="a pipeline trains on all micro-batches of a step at once, and the "
                    "training loader gives one",
                    fix="let it give omnilit.types.StepWindow, or leave pp_size out",
                )
            # Lightning divides by the number of micro-batches; the step's counts already did
            return self._share_of_loss(batch) * self.trainer.accumulate_grad_batches
        assert pipeline is not None, "a whole step at a time is for pipelines"
        for optimizer in self.trainer.optimizers:  # before the backward passes, which come here
            optimizer.zero_grad()
        self._step.begin(batch.micro_batches[0].stamp)
        return pipeline.train(batch, self._share_of_loss)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.assembled.pipeline is None:  # else it has run, micro-batch by micro-batch
            super().backward(loss, *args, **kwargs)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self.assembled.pipeline is None:  # else it would undo what `training_step` did
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _share_of_loss(self, batch: MicroBatch) -> Tensor:
        """What a micro-batch adds to the loss of its step."""
        terms = self.loss_terms(batch)
        return self._step.add(terms, batch, flops=self.batch_flops(batch))

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        max_norm = self.train_arguments.optimizer.max_grad_norm
        stages = None if self.assembled.pipeline is None else self.topology.pp
        grad_norm = clip_gradients(parameters, max_norm, stages=stages).item()
        if not self._step.take_norm(grad_norm):  # AdamW passes over what has no gradient
            optimizer.zero_grad(set_to_none=True)

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Any = None,
    ) -> None:
        lr = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.assembled.verify_step()
        # one all-reduce and one wait for the device
        totals = self._read_totals(self._step.meter)
        step = self.trainer.global_step + 1  # Lightning counts it after this hook
        self.step_result = self._step.result(totals, step=step, epoch=epoch, lr=lr)
        # equal on all ranks already
        self.log("loss", self.step_result.loss, prog_bar=True, logger=False)
        self._step.refuse_skips(self.train_arguments.optimizer.max_skipped_steps)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        arguments = self.train_arguments.optimizer
        optimizer = build_optimizer(
            self.assembled.model,
            arguments,
            part_of=self.parameter_part,
            rates=self.part_rates(),
            stages=self.assembled.stages,
        )
        schedule = AbsoluteSchedule(optimizer, arguments, total_steps=self._num_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }

    def _num_steps(self) -> int:
        """Steps of the whole run, for the schedule."""
        own = getattr(getattr(self.trainer, "datamodule", None), "num_steps", None)
        return int(self.trainer.estimated_stepping_batches) if own is None else own

    @override
    def on_train_epoch_start(self) -> None:
        # Lightning asks for the length once a fit; epochs that are passes differ in theirs
        loop = self.trainer.fit_loop
        if isinstance(loader := self.trainer.train_dataloader, Sized):
            loop.max_batches = len(loader)

    # Evaluation

    @override
    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        if self.assembled.pipeline is None:
            self._evaluate(batch)
        else:
            self.assembled.pipeline.evaluate(batch, self._evaluate)

    def _evaluate(self, batch: MicroBatch) -> Tensor:
        terms = self.loss_terms(batch)
        self._eval_meter.add(terms, batch)
        return torch.stack([term.sum for term in terms.values() if term.is_trained]).sum()

    @override
    def on_validation_epoch_end(self) -> None:
        self.eval_result = self._read_totals(self._eval_meter).of_evaluation()
        # equal on all ranks already
        self.log_dict(self.eval_result, logger=False, sync_dist=True)

    def complete(self, prompts: PromptSet, *, max_tokens: int) -> list[list[int]]:
        """Go on from prompts with the likeliest tokens; every rank calls with the same.

        Args:
            prompts: Held-out ones.
            max_tokens: Tokens of a completion at most.

        Returns:
            The tokens of each, without the one that ended it, the same on all ranks.
        """
        own = load_generation_config(self.model_path)
        generation = own or GenerationConfig.from_model_config(self.model_config)
        return complete_together(
            self.assembled,
            self.topology,
            prompts,
            max_tokens=max_tokens,
            stop=stop_tokens(generation, self.tokenizer),
            place=partial(self.trainer.strategy.batch_to_device, device=self.topology.device),
        )

    # Saving

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["omnilit"] = {
            "kernels": self.assembled.kernels.names(),
            "optimizer": self.train_arguments.optimizer.type,
            **self._step.state(),
            "export_dtype": str(self.export_dtype).removeprefix("torch."),
            "lora": describe_adapters(self.lora, base=self.model_path),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("omnilit", {})
        if self.trainer.state.fn == TrainerFn.FITTING:
            refuse_other_type(saved.get("optimizer"), self.train_arguments.optimizer)
        refuse_other_adapters(saved.get("lora"), self.lora)
        self._step.load_state(saved)
        before, now = saved.get("kernels", {}), self.assembled.kernels.names()
        for field, backend in now.items():
            if before.get(field, backend) != backend:
                log.warning("%s: saved with %s, resumed with %s", field, before[field], backend)

    @property
    def export_dtype(self) -> torch.dtype:
        """The type that exported weights are written in."""
        return choose_export_dtype(
            self.train_arguments.checkpoint.export_dtype,
            config=self.model_config,
            is_loaded=self.model_path is not None and not self.lora.enable,
            master=self.assembled.precision.master,
        )

    def export_weights(self, destination: Path) -> None:
        """Write the model as a Hugging Face folder; every rank calls.

        Args:
            destination: The folder to publish, such as `global_step_10/hf_ckpt`.

        Raises:
            CheckpointError: It cannot be written; on every rank.
        """
        tensors = self.assembled.gather_weights()
        export_together(
            self.model_config,
            tensors,
            self.processor or self.tokenizer,
            destination,
            dtype=self.export_dtype,
            model_path=self.model_path,
            trust_remote_code=self.trust_remote_code,
            shards=self.shard_files,
            adapted=self.assembled.adapted,
            is_writer=self.trainer.is_global_zero,
        )

    def _read_totals(self, meter: TermMeter) -> Totals:
        """What was added up, over all ranks; the meter begins anew."""
        totals = self.assembled.read_on_last(lambda: meter.read_totals(self._sum_over_ranks))
        meter.reset()
        return totals

    def _sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        return sum_over(values, self.topology.loss.get_group(), self.topology.device)
