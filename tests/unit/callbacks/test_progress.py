"""What a watcher reads: plain lines, or a bar that counts steps."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from omnilit.callbacks.evaluation import EvaluationSchedule
from omnilit.callbacks.metrics import MetricsRecorder
from omnilit.callbacks.progress import progress_callback


@pytest.fixture
def run(make_module, make_trainer, tmp_path):
    def fit(*, is_terminal, datamodule=None, **settings):
        shown = progress_callback(is_terminal=is_terminal)
        trainer = make_trainer(
            MetricsRecorder(tmp_path),
            shown,
            EvaluationSchedule(eval_steps=2, eval_epochs=0),
            enable_progress_bar=True,
            **settings,
        )
        trainer.fit(make_module(), datamodule=datamodule)
        return trainer

    return fit


def test_without_a_terminal_each_step_is_one_plain_line(run, caplog):
    with caplog.at_level(logging.INFO, logger="omnilit.callbacks.progress"):
        run(is_terminal=False)
    lines = [r.message for r in caplog.records if r.name == "omnilit.callbacks.progress"]
    start = r"step {}/4  loss 1\.0000  grad_norm 0\.5  lr 1\.0e-01  tokens/s \d+"
    ends = ["", r"  eval_loss 4\.0000", "", r"  eval_loss 6\.0000"]
    assert len(lines) == 4
    for number, (line, end) in enumerate(zip(lines, ends, strict=True), start=1):
        assert re.fullmatch(start.format(number) + end, line), line


def test_the_total_is_the_data_modules_where_it_knows_one(run, caplog):
    class Data(LightningDataModule):
        num_steps = 7

        def train_dataloader(self):
            return DataLoader(torch.ones(8), batch_size=1)  # pyright: ignore[reportArgumentType]

    with caplog.at_level(logging.INFO, logger="omnilit.callbacks.progress"):
        run(is_terminal=False, datamodule=Data(), limit_val_batches=0)
    lines = [r.message for r in caplog.records if r.name == "omnilit.callbacks.progress"]
    assert lines[0].startswith("step 1/7  loss ")


def test_the_bar_counts_optimizer_steps_and_shows_the_newest_numbers(
    make_module, make_trainer, tmp_path, capsys
):
    seen = []

    class Probe(Callback):
        def on_train_batch_end(self, trainer, *args, **kwargs):
            bar = trainer.progress_bar_callback.train_progress_bar
            seen.append((bar.n, bar.total))

    bar = progress_callback(is_terminal=True)
    make_trainer(MetricsRecorder(tmp_path), bar, Probe(), enable_progress_bar=True).fit(
        make_module()
    )
    assert seen == [(0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4), (4, 4)]
    assert re.search(
        r"4/4 .*loss=1\.0000, grad_norm=0\.5, lr=1\.0e-01, tokens/s=", capsys.readouterr().out
    )


def test_the_bar_shows_its_total_in_a_resumed_epoch(make_module, make_trainer, tmp_path, capsys):
    class SaveAt2(Callback):
        def on_train_batch_end(self, trainer, *args, **kwargs):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "at_2.ckpt", weights_only=False)

    make_trainer(SaveAt2(), max_steps=2).fit(make_module())
    bar = progress_callback(is_terminal=True)
    assert isinstance(bar, TQDMProgressBar)
    make_trainer(bar, enable_progress_bar=True).fit(
        make_module(), ckpt_path=tmp_path / "at_2.ckpt", weights_only=False
    )
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (4, 4)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lightning_adds_no_bar_of_its_own(run, is_terminal, capsys):
    trainer = run(is_terminal=is_terminal)
    assert sum(isinstance(c, ProgressBar) for c in trainer.callbacks) == 1


def test_another_rank_shows_nothing(run, caplog, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: False))
    with caplog.at_level(logging.INFO, logger="omnilit.callbacks.progress"):
        run(is_terminal=False)
    assert [r for r in caplog.records if r.name == "omnilit.callbacks.progress"] == []
