"""Completions of held-out prompts: in a file, in TensorBoard, in wandb."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omnilit.callbacks import EvalSamples, EvaluationSchedule, MetricsRecorder
from omnilit.callbacks.samples import exact_share, show_texts
from omnilit.config import TrainingArguments
from omnilit.data.collate import PLAIN
from omnilit.data.prompts import HeldOutPrompt, PromptSet, take_prompts
from omnilit.errors import ConfigError
from tests.helpers.samples import CountingSource

END = 9
SOURCE = CountingSource([4, 6, 8])
TEXT = {"prompt": "# 1 | 2\n<b>", "expected": "", "completion": "3\n4"}


class Prompts(LightningDataModule):
    """Has prompts, and the module's own loaders."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.train_dataloader, self.val_dataloader = module.train_dataloader, module.val_dataloader

    def eval_prompts(self, number: int) -> PromptSet:
        return PromptSet(take_prompts(SOURCE, number), PLAIN, 64, 64)


def completing(module: Any) -> Any:
    """A module that answers every prompt with the step and its number."""

    def complete(prompts: PromptSet, *, max_tokens: int) -> list[list[int]]:
        step = module.trainer.global_step
        return [[step, number][:max_tokens] for number in range(len(prompts.prompts))]

    def decode(ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == END))

    module.complete, module.tokenizer = complete, SimpleNamespace(decode=decode)
    return module


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def callbacks_of(folder: Path, **train: Any) -> list[Any]:
    arguments = TrainingArguments(eval_samples=2, **train)
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    return [EvalSamples(arguments, folder), MetricsRecorder(folder), schedule]


def test_each_evaluation_writes_prompts_expected_answers_and_completions(
    make_module, make_trainer, tmp_path
):
    module = completing(make_module())
    callbacks = callbacks_of(tmp_path, eval_samples_max_tokens=2)
    make_trainer(*callbacks).fit(module, datamodule=Prompts(module))
    lines = read(tmp_path / "eval_samples.jsonl")
    assert [line["completion"] for line in lines] == ["2 0", "2 1", "4 0", "4 1"]
    assert lines[1] == {
        "step": 2,
        "checkpoint": None,
        "sample": 2,
        "prompt": "1 1 1",
        "expected": "1 1 1",
        "completion": "2 1",
    }
    evaluated = [line for line in read(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    assert [line["eval_samples_tokens"] for line in evaluated] == [4.0, 4.0]
    assert all(line["eval_samples_s"] > 0 for line in evaluated)
    assert [line["eval_samples_exact"] for line in evaluated] == [0.0, 0.0]


def test_an_answer_is_exact_whatever_ends_it(make_module):
    prompts = tuple(HeldOutPrompt(one.prompt, (5, 7, END)) for one in take_prompts(SOURCE, 3))
    found = PromptSet(prompts, PLAIN, 64, 64)
    tokenizer = completing(make_module()).tokenizer
    assert exact_share(found, [[5, 7], [5, 7, END], [5]], tokenizer) == pytest.approx(2 / 3)
    assert math.isnan(exact_share(PromptSet((), PLAIN, 64, 64), [], tokenizer))


def test_samples_of_steps_that_a_run_goes_back_before_are_set_aside(
    make_module, make_trainer, tmp_path
):
    for _ in range(2):
        module = completing(make_module())
        make_trainer(*callbacks_of(tmp_path)).fit(module, datamodule=Prompts(module))
    assert len(read(tmp_path / "eval_samples.jsonl")) == 4
    assert len(read(tmp_path / "eval_samples.jsonl.1")) == 4


def test_validate_adds_to_the_file(make_module, make_trainer, tmp_path):
    module, trainer = completing(make_module()), make_trainer(*callbacks_of(tmp_path))
    trainer.validate(module, datamodule=Prompts(module), verbose=False)
    assert [line["completion"] for line in read(tmp_path / "eval_samples.jsonl")] == ["0 0", "0 1"]
    assert "eval_samples_s" in read(tmp_path / "eval.jsonl")[0]


def test_a_trial_run_writes_nothing(make_module, make_trainer, tmp_path):
    module = completing(make_module())
    trainer = make_trainer(*callbacks_of(tmp_path), fast_dev_run=True)
    trainer.fit(module, datamodule=Prompts(module))
    assert not (tmp_path / "eval_samples.jsonl").exists()


def test_data_without_prompts_is_refused(make_module, make_trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.eval_samples: NoneType has no prompts"):
        make_trainer(*callbacks_of(tmp_path)).fit(completing(make_module()))


def test_tensorboard_shows_the_text_as_it_is(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    show_texts(logger, [TEXT, TEXT], step=3)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["tensors"] == ["samples/1/text_summary", "samples/2/text_summary"]
    (event,) = events.Tensors("samples/2/text_summary")
    assert event.step == 3
    text = event.tensor_proto.string_val[0].decode()
    assert "**prompt**\n\n    # 1 | 2\n    <b>\n\n**expected**" in text
    assert text.endswith("**completion**\n\n    3\n    4")


def test_wandb_gets_a_table(tmp_path, monkeypatch):
    logged: list[tuple[dict[str, Any], int]] = []
    run: Any = SimpleNamespace(id="x")
    logger = WandbLogger(save_dir=tmp_path, experiment=run)
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step: logged.append((metrics, step)))
    show_texts(logger, [TEXT], step=3)
    ((metrics, step),) = logged
    table = metrics["samples"]
    assert isinstance(table, wandb.Table)
    assert (table.columns, table.data, step) == ([*TEXT], [[*TEXT.values()]], 3)


def test_a_logger_without_text_is_passed_over(tmp_path):
    show_texts(CSVLogger(tmp_path), [TEXT], step=3)
