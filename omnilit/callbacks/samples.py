"""What the model makes of held-out prompts, written down and shown at every evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from omnilit.callbacks.answered import (
    Answered,
    draw_prompts,
    exhibit_answers,
    join_answers,
    save_pictures,
)
from omnilit.callbacks.metrics_file import MetricsFile, append_lines
from omnilit.callbacks.showing import show_exhibit
from omnilit.callbacks.trainer_view import datamodule_of, is_trial_run
from omnilit.checkpoint.layout import EVAL_MEDIA, EVAL_SAMPLES
from omnilit.checkpoint.save import saved_step
from omnilit.checkpoint.together import run_together
from omnilit.config import TrainingArguments
from omnilit.data.media.pictures import Picture
from omnilit.data.prompts import PromptSet
from omnilit.errors import ConfigError
from omnilit.logging import get_logger

log = get_logger(__name__)
KEY: Final = "train.eval_samples"


class _Module(Protocol):
    eval_result: dict[str, float] | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        ...

    def complete(self, prompts: PromptSet, *, max_tokens: int) -> list[list[int]]:
        """Go on from prompts; every rank calls."""
        ...


class _Data(Protocol):
    def eval_prompts(self, number: int) -> PromptSet:
        """What the first records of the evaluation data ask for."""
        ...


class EvalSamples(Callback):
    """Complete the first prompts of the evaluation data after each evaluation.

    Prompt, expected answer and completion go to `eval_samples.jsonl` in the folder of the run, and
    as text to TensorBoard and wandb. Of images, videos and sounds in the prompts, small pictures go
    to `eval_media/`, and cards with pictures and words to TensorBoard and wandb. How long it took,
    the tokens and the share of completions that are the expected answers are numbers of the
    evaluation. Completions are greedy. A `fast_dev_run` writes nothing.

    Stands before `MetricsRecorder`, which writes the evaluation's numbers.

    Args:
        train: `eval_samples` of them, of `eval_samples_max_tokens` at most.
        output_dir: Folder of the run.
    """

    def __init__(self, train: TrainingArguments, output_dir: str | Path) -> None:
        self.num_samples = train.eval_samples
        self.max_tokens = train.eval_samples_max_tokens
        self._path = Path(output_dir) / EVAL_SAMPLES
        self._drawn: list[tuple[Picture, ...]] = []  # of the prompts, which stay the same
        self._file = MetricsFile(self._path)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _data_of(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_trial_run(trainer):
            run_together(
                lambda: self._file.open_at(trainer.global_step),
                name=f"opening {self._path}",
                on_first=True,
            )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, began = cast("_Module", pl_module), time.monotonic()
        prompts = _data_of(trainer).eval_prompts(self.num_samples)
        completions = module.complete(prompts, max_tokens=self.max_tokens)
        answers = join_answers(prompts, completions, module.tokenizer)
        module.eval_result = (module.eval_result or {}) | {
            "eval_samples_s": time.monotonic() - began,
            "eval_samples_tokens": float(sum(map(len, completions))),
            "eval_samples_exact": exact_share(answers),
        }
        if trainer.is_global_zero and not is_trial_run(trainer):
            if len(self._drawn) != len(answers):
                self._drawn = draw_prompts(prompts)
            pairs = zip(answers, self._drawn, strict=True)
            self._write(trainer, [replace(one, pictures=drawn) for one, drawn in pairs])

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._file.close()

    def _write(self, trainer: Trainer, answers: Sequence[Answered]) -> None:
        is_fit = trainer.state.fn == TrainerFn.FITTING
        loaded = None if is_fit or not trainer.ckpt_path else Path(trainer.ckpt_path)
        step = trainer.global_step if loaded is None else saved_step(loaded)
        checkpoint = None if loaded is None else str(loaded)
        lines: list[dict[str, Any]] = []
        for number, one in enumerate(answers, start=1):
            line = {"step": step, "checkpoint": checkpoint, "sample": number, **one.texts}
            if media := save_pictures(self._path.with_name(EVAL_MEDIA), one.pictures):
                line["media"] = media
            lines.append(line)
        if not is_fit:
            append_lines(self._path, lines)
            return
        for line in lines:
            self._file.append(line)
        show_exhibit(trainer.loggers, exhibit_answers(answers), step=step)


def exact_share(answers: Sequence[Answered]) -> float:
    """The share of completions whose text is that of the expected answer; nan of no prompts.

    Special tokens and space around a text do not count.
    """
    return sum(one.is_exact for one in answers) / len(answers) if answers else math.nan


def _data_of(trainer: Trainer) -> _Data:
    """The data module, which has to know what prompts are.

    Raises:
        ConfigError: It is another one than ours, and does not.
    """
    data = datamodule_of(trainer)
    if not callable(getattr(data, "eval_prompts", None)):
        raise ConfigError(
            key=KEY,
            problem=f"{type(data).__name__} has no prompts to complete",
            fix="use OmniDataModule with data.eval_path, or leave eval_samples out",
        )
    return cast("_Data", data)
