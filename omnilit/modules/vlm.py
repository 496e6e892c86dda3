"""Supervised training of models that see and hear, beside reading and writing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from transformers import PretrainedConfig
from transformers.processing_utils import ProcessorMixin
from typing_extensions import override

from omnilit.config import TrainingArguments
from omnilit.data.media.processor import find_processor
from omnilit.errors import ConfigError, Problem
from omnilit.models.architecture import choose_towers
from omnilit.models.towers import VISION
from omnilit.modules.assembly import ModelRequest
from omnilit.modules.availability import refuse_arguments
from omnilit.modules.sft import SFTModule
from omnilit.types import MicroBatch


class VLMModule(SFTModule):
    """Trains a model of text, images, videos and sounds on its supervised tokens.

    Rows hold media beside tokens, and rows of text alone train as well. The vision tower has a
    learning rate of its own, and towers can be left as they are.

    Args:
        encoder_data_balance: Balance the vision tower's work over ranks.
        encoder_data_balance_sorting_algo: How it is balanced.
        kwargs: The arguments of `OmniModule`.
    """

    takes_media: ClassVar[bool] = True

    def __init__(
        self,
        *,
        encoder_data_balance: bool | None = False,
        encoder_data_balance_sorting_algo: str | None = "post_mbs_balancing_greedy_without_pad",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        balance = {
            "encoder_data_balance": encoder_data_balance,
            "encoder_data_balance_sorting_algo": encoder_data_balance_sorting_algo,
        }
        refuse_arguments(VLMModule, "model", balance)
        if problems := _unfit(self.train_arguments, is_adapted=self.lora.enable):
            raise ConfigError.of(problems)

    @override
    def _choose_model(self, config: PretrainedConfig) -> PretrainedConfig:
        choose_towers(config)
        return config

    @override
    def _model_request(self) -> ModelRequest:
        return replace(super()._model_request(), takes_media=True)

    @property
    @override
    def processor(self) -> ProcessorMixin | None:
        return self._processor

    @cached_property
    def _processor(self) -> ProcessorMixin | None:
        if self.tokenizer_path is None:
            return None
        return find_processor(self.tokenizer_path, trust_remote_code=self.trust_remote_code)

    def prepare_row(self, batch: MicroBatch) -> MicroBatch:
        """What a micro-batch becomes while its row is whole and on the CPU."""
        media = self.binding.media
        assert media is not None, "the request says that rows hold media"
        return media.prepare(batch, is_split=self.topology.sequence_size > 1)

    @override
    def batch_flops(self, batch: MicroBatch) -> float | None:
        flops, towers = super().batch_flops(batch), self.assembled.media_flops
        of_media = 0.0 if towers is None else towers.of_batch(batch)
        return None if flops is None or of_media is None else flops + of_media

    @override
    def parameter_part(self, name: str) -> str:
        towers = self.assembled.towers
        return super().parameter_part(name) if towers is None else towers.part_of(name)

    @override
    def part_rates(self) -> Mapping[str, float]:
        return {VISION: self.train_arguments.vit_lr}


def _unfit(train: TrainingArguments, *, is_adapted: bool) -> list[Problem]:
    """What a model with towers cannot be trained with."""
    found = []
    if train.accelerator.pp_size > 1:
        problem = "a model with towers cannot be cut into stages, which hand on hidden states alone"
        found.append(Problem("train.accelerator.pp_size", problem, "leave it out"))
    frozen = [name for name in ("freeze_vit", "freeze_audio_tower") if getattr(train, name)]
    if is_adapted:
        found += [
            Problem(f"train.{name}", "adapters freeze the whole model already", "leave it out")
            for name in frozen
        ]
    return found
