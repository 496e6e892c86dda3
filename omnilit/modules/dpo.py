"""Preference optimisation: pairs of answers, and where the loss asks for it a reference model."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from omnilit.config import (
    DPOConfig,
    GradientCheckpointingConfig,
    LoraArguments,
    MixedPrecisionConfig,
)
from omnilit.errors import ConfigError
from omnilit.losses.lm import BALANCE
from omnilit.losses.preference import (
    PairScores,
    needs_reference,
    pair_losses,
    pair_metrics,
    takes_means,
)
from omnilit.losses.segments import sum_by_segment
from omnilit.modules.assembly import AssembledModel, ModelRequest
from omnilit.modules.availability import refuse_unavailable
from omnilit.modules.base import OmniModule
from omnilit.modules.reference import StoredReference, describe_weights, pair_data_of
from omnilit.parallel.fsdp import reshard
from omnilit.types import IGNORE, PAIRS, LossTerm, MicroBatch, StepWindow

LOSS = "dpo"


class DPOModule(OmniModule):
    """Trains a causal language model to prefer the chosen answer of each pair.

    The loss is the mean over all pairs of the step on all ranks. The reference model, where the
    loss has one, starts from the same weights, is sharded like the policy, computes in a
    precision of its own and is never trained or saved. With adapters it is the frozen model under
    them, without a second copy. With `precompute_reference` it is asked before training, and gone.

    Args:
        dpo_config: The `dpo_config` group; the command line fills it in.
        kwargs: The arguments of `OmniModule`.
    """

    data_type: ClassVar[str | None] = "dpo"

    def __init__(self, *, dpo_config: DPOConfig = DPOConfig(), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        refuse_unavailable(dpo_config, "dpo_config")
        self.dpo_config = dpo_config
        self.reference: AssembledModel | None = None
        self.stored: StoredReference | None = None
        self._reference_scores: dict[int, PairScores] = {}  # of micro-batches, in a pipeline

    @property
    def further_dtypes(self) -> tuple[str, ...]:
        """What a model computes in beside the one that is trained."""
        has_copy = needs_reference(self.dpo_config) and self._has_copy
        return (self.dpo_config.refer_model_precision,) if has_copy else ()

    @property
    def _has_copy(self) -> bool:
        """Whether the reference is a model of its own, not the frozen one under adapters."""
        return not self.lora.enable or bool(self.lora.modules_to_save)

    @override
    def configure_model(self) -> None:
        if self.policy is not None or not needs_reference(self.dpo_config):
            super().configure_model()
        elif self._has_copy:
            self.stored = self._find_stored(self.dpo_config.refer_model_precision)
            if self.stored is None or self.stored.lacking:
                self.reference = self._build_reference()
            self._ask_once()  # the policy is not there yet: there is room for one of them
            super().configure_model()
        else:  # the frozen model under the adapters
            super().configure_model()
            self.reference = self.policy
            self.stored = self._find_stored(str(self.assembled.precision))
            self._ask_once()

    def _build_reference(self) -> AssembledModel:
        reference = self._assemble(self._reference_request())
        for part in reference.parts:
            part.requires_grad_(False).eval()
        return reference

    def _find_stored(self, precision: str) -> StoredReference | None:
        """What was computed before of the reference, where the run asks for that."""
        if not self.dpo_config.precompute_reference:
            return None
        is_drawn = self.model_path is None or not self.strict  # some weights, or all
        seed = self.train_arguments.seed if is_drawn else None
        weights = describe_weights(self.model_config, self.model_path, seed=seed)
        data = pair_data_of(getattr(self.trainer, "datamodule", None))
        means = takes_means(self.dpo_config)
        return StoredReference(data, {**weights, "precision": precision, "means": means})

    def _ask_once(self) -> None:
        """Compute what is lacking, and let go of the reference."""
        if self.stored is None:
            return
        device = self.topology.device
        if self.stored.lacking:
            place = partial(self.trainer.strategy.batch_to_device, device=device)
            self.stored.compute(self._score_before, place)
            if self.reference is not None and self.reference is not self.policy:
                self.reference.verify_step()
        self.reference = None
        gc.collect()  # its modules and the hooks on them refer to each other
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()

    def _score_before(self, batch: MicroBatch) -> PairScores | None:
        """Scores of a micro-batch; None where a pipeline's last stage is on another rank."""
        self._run_reference([batch])
        if self.reference is not None and self.reference.pipeline is not None:
            return self._reference_scores.pop(id(batch), None)
        return self._score_by_reference(batch)

    def _reference_request(self) -> ModelRequest:
        """The model as it was before training: also where a checkpoint is gone on from."""
        request = self._model_request()
        dtype = self.dpo_config.refer_model_precision
        fsdp = replace(
            request.fsdp,
            mixed_precision=MixedPrecisionConfig(enable=False, master_dtype=dtype),
        )
        train = replace(
            request.train,
            gradient_checkpointing=GradientCheckpointingConfig(enable=False),
            enable_compile=False,
        )
        accelerator = replace(request.accelerator, fsdp_config=fsdp)
        plain = replace(request, lora=LoraArguments())  # the model that adapters start from
        return replace(plain, train=train, accelerator=accelerator, is_resume=False)

    @override
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        if PAIRS not in batch.counts:
            raise ConfigError(
                key="data.data_type",
                problem="the data has no pairs of answers, and DPOModule compares such",
                fix="set data.data_type: dpo",
            )
        reference = self._score_by_reference(batch)
        output = self.assembled.forward(batch)
        policy = self._pair_scores(output.token_losses, batch)
        losses = pair_losses(policy, reference, self.dpo_config).sum()
        terms = {LOSS: LossTerm(self._own_share(losses), PAIRS)}
        if output.balance is not None:
            terms[BALANCE] = LossTerm(output.balance)
        for name, values in pair_metrics(policy, reference, self.dpo_config).items():
            terms[name] = LossTerm(self._own_share(values.sum()), PAIRS, is_trained=False)
        return terms

    @override
    def batch_flops(self, batch: MicroBatch) -> float | None:
        flops = super().batch_flops(batch)
        if flops is None or self.reference is None or self.reference.flops is None:
            return flops
        return flops + self.reference.flops.forward_of_batch(batch)

    @override
    def training_step(self, batch: MicroBatch | StepWindow, batch_idx: int) -> Tensor:
        self._run_reference([batch] if isinstance(batch, MicroBatch) else batch)
        return super().training_step(batch, batch_idx)

    @override
    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self._run_reference([batch])
        super().validation_step(batch, batch_idx)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.reference is not None and self.reference is not self.policy:
            self.reference.verify_step()

    def _run_reference(self, batches: Iterable[MicroBatch]) -> None:
        """Where the reference is a pipeline, run it whole: no rank has all of it."""
        self._reference_scores.clear()
        if self.reference is None or self.reference.pipeline is None:
            return

        def keep(batch: MicroBatch) -> Tensor:
            assert self.reference is not None
            losses = self.reference.forward(batch).token_losses
            self._reference_scores[id(batch)] = self._pair_scores(losses, batch)
            return losses.sum()

        with self._as_reference(self.reference):
            for batch in batches:
                self.reference.pipeline.evaluate(batch, keep)

    @contextmanager
    def _as_reference(self, model: AssembledModel) -> Iterator[None]:
        """Without gradients, dropout and adapters."""
        modes = [part.training for part in model.parts]
        off = nullcontext() if model.adapted is None else model.adapted.switched_off()
        try:
            with torch.no_grad(), off:
                for part in model.parts:
                    part.eval()
                yield
        finally:
            for part, mode in zip(model.parts, modes, strict=True):
                part.train(mode)

    def _score_by_reference(self, batch: MicroBatch) -> PairScores | None:
        if self.reference is None:
            return None if self.stored is None else self.stored.of_batch(batch)
        if self.reference.pipeline is not None:
            return self._reference_scores.pop(id(batch))
        with self._as_reference(self.reference):
            scores = self._pair_scores(self.reference.forward(batch).token_losses, batch)
        for part in self.reference.parts:
            reshard(part)
        return scores

    def _pair_scores(self, token_losses: Tensor, batch: MicroBatch) -> PairScores:
        """Log-probabilities of the answers.

        Where several ranks hold parts of the row, each has the whole sums, whose gradient goes
        to its own tokens: every rank's loss is the whole one, and `_own_share` counts it once.

        Args:
            token_losses: Of the supervised tokens here, [R].
            batch: Segments in turn chosen and rejected.
        """
        weights = None if batch.weights is None else batch.weights[batch.labels != IGNORE]
        log_p = -token_losses.float() if weights is None else -token_losses.float() * weights
        sums = sum_by_segment(log_p, batch)
        if takes_means(self.dpo_config):
            each = torch.ones_like(log_p) if weights is None else weights
            sums = sums / self._complete(sum_by_segment(each.float(), batch)).clamp(min=1e-6)
        # neither padding nor what fills a window is a pair
        scores = self._complete(sums)[: len(batch.origins)].view(-1, 2)
        return PairScores(scores[:, 0], scores[:, 1])

    def _complete(self, sums: Tensor) -> Tensor:
        """Sums over the ranks of a row; the gradient goes to what this rank adds."""
        group = self.topology.sequence_group
        if group is None:
            return sums
        total = sums.detach().clone()
        dist.all_reduce(total, group=group)
        return sums + (total - sums.detach())

    def _own_share(self, value: Tensor) -> Tensor:
        """A value that the ranks of a row all have, such that its sum over them is the value.

        Its gradient stays whole, since each rank passes it on to its own tokens alone.
        """
        group = self.topology.sequence_group
        if group is None:
            return value
        return value - value.detach() * (1 - 1 / dist.get_world_size(group))
