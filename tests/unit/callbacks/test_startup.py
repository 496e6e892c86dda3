"""The report at the start: every table once, and the first sample."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from omnilit.callbacks.startup import StartupReport, parameter_rows


class Rows:
    def __init__(self, word):
        self.word = word

    def rows(self):
        return ("what", "value"), [(self.word, 1)]


class Data(LightningDataModule):
    steps_per_epoch = 2
    passes_per_epoch = 1.0

    def train_dataloader(self):
        return DataLoader(torch.ones(4), batch_size=1)  # pyright: ignore[reportArgumentType]

    def rows(self):
        return ("source", "samples"), [("pydoc", 42)]

    def first_sample_text(self):
        return "<user> hi <bot> [[hello]]"


@pytest.fixture
def report(make_module, make_trainer, caplog):
    def fit(datamodule, *, is_first=True):
        class Bound(make_module):
            binding = Rows("rms_norm")

        module = Bound()
        trainer = make_trainer(StartupReport(), max_epochs=2, limit_val_batches=0)
        trainer.strategy.topology = Rows("fsdp")
        with caplog.at_level(logging.INFO, logger="omnilit.callbacks.startup"):
            trainer.fit(module, datamodule=datamodule)
        return [r for r in caplog.records if r.name == "omnilit.callbacks.startup"]

    return fit


def test_every_table_and_the_first_sample_are_logged_once(report):
    messages = [record.message for record in report(Data())]
    assert [message.splitlines()[0] for message in messages] == [
        "Mesh",
        "Kernels",
        "Parameters",
        "Data",
        "Data: 2 steps an epoch, 1.00 passes through the data",
        "First sample",
    ]
    assert "fsdp" in messages[0]
    assert "rms_norm" in messages[1]
    assert "pydoc" in messages[3]
    assert messages[5].endswith("[[hello]]")


@pytest.mark.parametrize(("passes", "warns"), [(4.0, False), (4.1, True)])
def test_more_than_four_passes_are_a_warning(report, passes, warns):
    data = Data()
    data.passes_per_epoch = passes
    warnings = [r.message for r in report(data) if r.levelno == logging.WARNING]
    assert bool(warnings) == warns
    if warns:
        assert warnings[0].startswith("Data: an epoch passes 4.1 times through the data")


def test_another_rank_logs_nothing(report, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: False))
    assert report(Data()) == []


def test_parameters_are_counted_by_group_with_what_is_frozen(make_module):
    module = make_module()
    module.big = torch.nn.Linear(1000, 2, bias=False)
    module.big.weight.requires_grad_(False)
    groups = [
        {"name": "backbone", "params": [module.net.weight], "weight_decay": 0.1, "lr": 0.0}
        | {"initial_lr": 1e-3}
    ]
    header, rows = parameter_rows(groups, module)
    assert header == ("group", "tensors", "parameters", "trainable", "weight decay", "lr")
    assert list(rows) == [
        ("backbone", 1, "1", "yes", 0.1, "1.0e-03"),
        ("frozen", 1, "2,000", "no", "", ""),
        ("all", 2, "2,001", "", "", ""),
    ]
