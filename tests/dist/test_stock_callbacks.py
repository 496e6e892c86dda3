"""Lightning's own callbacks and loggers in real runs of ours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from omnilit.callbacks import HyperparameterLog
from omnilit.cli.stock import settle_callbacks
from omnilit.errors import ConfigError
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_conversations(folder / "train.jsonl", 60)
    training.write_conversations(folder / "eval.jsonl", 9, seed=1)
    return folder


class Evaluations(Callback):
    """The loss of every evaluation, by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses[trainer.global_step] = trainer.callback_metrics["eval_loss"].item()


def run(folder: Path, out: str, *callbacks: Callback, **over: Any) -> dict[str, Any]:
    loggers, load_path = over.pop("loggers", ()), over.pop("load_path", None)
    settings: dict[str, Any] = {"global_batch_size": 4, "max_steps": 4, "eval_steps": 1, **over}
    settle_callbacks(callbacks, folder / out, has_evaluation=True)
    evaluations = Evaluations()
    log, module = training.train(
        folder,
        training.arguments(folder / out, **settings),
        data={"eval_path": str(folder / "eval.jsonl")},
        callbacks=(evaluations, *callbacks),
        loggers=loggers,
        load_path=load_path,
    )
    return {
        "numbers": training.numbers(log),
        "weights": training.weights_of(module),
        "evaluations": evaluations.losses,
    }


def run_checkpoints(folder: Path, out: str) -> dict[str, Any]:
    """The two best of four steps, and one by the training loss; then on from the best."""
    best = ModelCheckpoint(monitor="eval_loss", save_top_k=2, filename="{step}", save_last=True)
    trained = ModelCheckpoint(
        monitor="loss", mode="max", every_n_train_steps=2, dirpath=folder / out / "mine"
    )
    whole = run(folder, out, best, trained, optimizer={"lr": 2e-2})
    saved = {name: score.item() for name, score in best.best_k_models.items()}
    first = min(saved, key=lambda name: int(name.rpartition("=")[2].partition(".")[0]))
    again = run(folder, f"{out}_again", optimizer={"lr": 2e-2}, load_path=Path(first))
    return {
        "whole": whole,
        "again": again,
        "saved": saved,
        "first": first,
        "best": best.best_model_path,
        "last": best.last_model_path,
        "trained": trained.best_model_path,
    }


def test_a_model_checkpoint_keeps_the_best_and_a_run_goes_on_from_it(folder, tmp_path):
    out = "best"
    found, _ = run_ranks(run_checkpoints, 2, folder, out, tmp_path=tmp_path, timeout_s=150)
    losses = found["whole"]["evaluations"]
    best = sorted(losses, key=losses.__getitem__)[:2]
    checkpoints = folder / out / "checkpoints"
    expected = {str(checkpoints / f"step={step}.ckpt"): losses[step] for step in best}
    assert found["saved"] == pytest.approx(expected)
    assert found["best"] == str(checkpoints / f"step={best[0]}.ckpt")
    assert found["last"] == str(checkpoints / "last.ckpt")
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {*(Path(name).name for name in expected), "last.ckpt"}  # worse ones are gone
    assert Path(found["trained"]).parent == folder / out / "mine"
    step = int(Path(found["first"]).stem.partition("=")[2])
    assert found["again"]["numbers"] == found["whole"]["numbers"][step:]
    assert training.is_bit_equal(found["again"]["weights"], found["whole"]["weights"])


def run_early(folder: Path) -> dict[str, Any]:
    return run(folder, "early", EarlyStopping("eval_loss", patience=2, min_delta=1e6))


def run_logged(folder: Path) -> dict[str, Any]:
    logger = CSVLogger(folder / "logged", name="csv", version="")
    tree = {"train": {"seed": 1}, "trainer": {"key": "${oc.env:SECRET}"}}
    callbacks = (LearningRateMonitor(), HyperparameterLog(tree))
    schedule = {"lr_decay_style": "linear", "lr_min": 0.0}
    return run(folder, "logged", *callbacks, loggers=(logger,), max_steps=3, optimizer=schedule)


def run_weights_only(folder: Path) -> str:
    checkpoint = ModelCheckpoint(monitor="eval_loss", save_weights_only=True)
    with pytest.raises(ConfigError) as caught:
        training.train(
            folder,
            training.arguments(folder / "weights", max_steps=1, eval_steps=1),
            data={"eval_path": str(folder / "eval.jsonl")},
            callbacks=(checkpoint,),
        )
    return str(caught.value)


def run_alone(folder: Path) -> dict[str, Any]:
    return {
        "early": run_early(folder),
        "logged": run_logged(folder),
        "weights only": run_weights_only(folder),
    }


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("alone")
    return run_ranks(run_alone, 1, folder, tmp_path=tmp_path, timeout_s=150)[0]


def test_early_stopping_ends_a_run_whose_evaluation_gets_no_better(alone):
    found = alone["early"]
    assert list(found["evaluations"]) == [1, 2, 3]
    assert [number[0] for number in found["numbers"]] == [1, 2, 3]


def test_a_stock_logger_gets_metrics_settings_and_what_stock_callbacks_log(folder, alone):
    found = alone["logged"]
    with (folder / "logged" / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["grad_norm"]]
    assert [int(row["step"]) for row in ours] == [1, 2, 3]
    for row, (_, loss, grad_norm, tokens) in zip(ours, found["numbers"], strict=True):
        assert float(row["loss"]) == pytest.approx(loss)
        assert float(row["grad_norm"]) == pytest.approx(grad_norm)
        assert float(row["tokens"]) == tokens
        assert float(row["eval_loss"]) == pytest.approx(found["evaluations"][int(row["step"])])
    rates = {row[name] for row in rows for name in row if name.startswith("lr-") and row[name]}
    assert len(rates) == 3
    hparams = yaml.safe_load((folder / "logged" / "csv" / "hparams.yaml").read_text())
    assert hparams == {"train": {"seed": 1}, "trainer": {"key": "${oc.env:SECRET}"}}


def test_a_checkpoint_of_weights_alone_is_refused(alone):
    assert "weights alone was asked for" in alone["weights only"]
    assert "leave out save_weights_only" in alone["weights only"]
