"""Completions of held-out prompts: in a file, in TensorBoard, in wandb."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import wandb
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omnilit.callbacks import EvalSamples, EvaluationSchedule, MetricsRecorder
from omnilit.callbacks.answered import Answered, exhibit_answers, join_answers
from omnilit.callbacks.samples import exact_share
from omnilit.callbacks.showing import show_exhibit
from omnilit.config import TrainingArguments
from omnilit.data.collate import PLAIN
from omnilit.data.media.pictures import Picture
from omnilit.data.prompts import HeldOutPrompt, PromptSet, take_prompts
from omnilit.errors import ConfigError
from omnilit.types import Medium, Origin, Sample
from tests.helpers.samples import CountingSource

END = 9
SOURCE = CountingSource([4, 6, 8])
TEXT = {"prompt": "# 1 | 2\n<b>", "expected": "", "completion": "3\n4"}
SAID = Answered(TEXT, TEXT)


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
    answers = join_answers(found, [[5, 7], [5, 7, END], [5]], tokenizer)
    assert exact_share(answers) == pytest.approx(2 / 3)
    assert math.isnan(exact_share([]))


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
    show_exhibit([logger], exhibit_answers([SAID, SAID]), step=3)
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
    show_exhibit([logger], exhibit_answers([SAID]), step=3)
    ((metrics, step),) = logged
    table = metrics["samples"]
    assert isinstance(table, wandb.Table)
    assert (table.columns, table.data, step) == ([*TEXT], [[*TEXT.values()]], 3)


def test_a_logger_without_text_is_passed_over(tmp_path):
    show_exhibit([CSVLogger(tmp_path)], exhibit_answers([SAID]), step=3)


class Seeing(Prompts):
    """Has a prompt of three places, the first two of them of an image."""

    def __init__(self, module: Any, file: Path) -> None:
        super().__init__(module)
        media = SimpleNamespace(is_place=lambda ids: ids == 7)
        image = Medium("image", str(file), num_tokens=2)
        ids = np.asarray([7, 7, 1], np.int32)
        prompt = Sample(ids, np.full_like(ids, -100), Origin("eval", "f", 1), media=(image,))
        settings = replace(PLAIN, media=cast("Any", media))
        one = HeldOutPrompt(prompt, (4, 0))
        self.prompts = PromptSet((one, replace(one, expected=(5,))), settings, 64, 64)

    def eval_prompts(self, number: int) -> PromptSet:
        return self.prompts


def test_images_of_prompts_are_kept_once_and_shown_with_question_and_answers(
    make_module, make_trainer, tmp_path
):
    Image.new("RGB", (32, 16), (250, 0, 0)).save(tmp_path / "a.png")
    module, loggers = completing(make_module()), [TensorBoardLogger(tmp_path, "", "")]
    data = Seeing(module, tmp_path / "a.png")
    make_trainer(*callbacks_of(tmp_path), logger=loggers).fit(module, datamodule=data)
    lines = read(tmp_path / "eval_samples.jsonl")
    assert [(line["prompt"], line["step"]) for line in lines] == [("7 1", s) for s in (2, 2, 4, 4)]
    (file,) = (tmp_path / "eval_media").iterdir()
    kept = {"caption": "image, 32 x 16, 2 tokens", "file": file.name}
    assert all(line["media"] == [kept] for line in lines)
    with Image.open(file) as image:
        assert image.size == (32, 16)
    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["samples/1", "samples/2"]
    cards = [
        np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        for name in ("samples/1", "samples/2")
        for event in events.Images(name)
    ]
    red = (cards[0] == (250, 0, 0)).all(axis=-1)
    assert red.sum() == 192 * 96  # enlarged by a whole factor
    # the first is answered rightly at step 4, and nothing else ever
    right = [bool((card == (28, 107, 42)).all(axis=-1).any()) for card in cards]
    assert right == [False, True, False, False]


def test_wandb_gets_cards_beside_the_texts(tmp_path, monkeypatch):
    logged: list[dict[str, Any]] = []
    logger = WandbLogger(save_dir=tmp_path, experiment=cast("Any", SimpleNamespace(id="x")))
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step: logged.append(metrics))
    seen = replace(SAID, pictures=(Picture("image", Image.new("RGB", (8, 8))),))
    show_exhibit([logger], exhibit_answers([seen, SAID]), step=3)
    table = logged[0]["samples"]
    assert table.columns == ["card", *TEXT]
    assert isinstance(table.data[0][0], wandb.Image)
    assert table.data[1] == [None, *TEXT.values()]
