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
from omnilit.config.ranges import ALGORITHM, refuse_name
from omnilit.data.media.processor import find_processor
from omnilit.errors import ConfigError, Problem
from omnilit.models.architecture import choose_towers
from omnilit.models.towers import VISION
from omnilit.modules.assembly import ModelRequest
from omnilit.modules.sft import SFTModule
from omnilit.types import MicroBatch


class VLMModule(SFTModule):
    """Trains a model of text, images, videos and sounds on its supervised tokens.

    Rows hold media beside tokens, and rows of text alone train as well. The vision tower has a
    learning rate of its own, and towers can be left as they are.

    Args:
        encoder_data_balance: Share the vision tower's work out among all ranks, whoever's rows have
            the images and videos.
        encoder_data_balance_sorting_algo: How: `post_mbs_balancing_greedy_without_pad` gives the
            dearest first, each to the rank that has least to do so far.
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
        self.encoder_data_balance = bool(encoder_data_balance)
        problems = _unfit(self.train_arguments, is_adapted=self.lora.enable)
        problems += refuse_name(ALGORITHM, encoder_data_balance_sorting_algo)
        if problems:
            raise ConfigError.of(problems)

    @property
    @override
    def shares_media(self) -> bool:
        return self.encoder_data_balance

    @override
    def _choose_model(self, config: PretrainedConfig) -> PretrainedConfig:
        return choose_towers(config)

    @override
    def _model_request(self) -> ModelRequest:
        request = super()._model_request()
        return replace(request, takes_media=True, balances_media=self.shares_media)

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
        towers = self.assembled.media_flops
        cost = None if towers is None else towers.of_row(batch)
        return replace(media.prepare(batch), media_flops=cost)

    @override
    def batch_flops(self, batch: MicroBatch) -> float | None:
        flops, of_media = super().batch_flops(batch), batch.media_flops
        # media count where their row is, an even share on each rank of it, whoever looks at them
        return None if flops is None or of_media is None else flops + of_media / batch.num_parts

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
