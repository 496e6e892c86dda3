"""The command line's loggers and callbacks, built for real and handed a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from omnilit.callbacks import (
    CheckpointSaver,
    EvalSamples,
    EvaluationSchedule,
    HyperparameterLog,
    MetricsRecorder,
)
from omnilit.callbacks.memory import CacheRelease, GarbageCollector
from omnilit.callbacks.profiler import StepProfiler
from omnilit.cli.omni_cli import OmniCLI
from omnilit.cli.plan import make_plan
from omnilit.cli.raw import read_command
from omnilit.cli.wandb_run import WandbRun
from omnilit.errors import ConfigError

SECRET = "s3cr3t-of-the-environment"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything that watches a run, with something secret among the settings."""
    monkeypatch.setenv("MY_SECRET", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning's command line sets them
        monkeypatch.setenv(name, "0")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return {
        "model": {"config_path": str(model)},
        "data": {
            "train_path": str(tmp_path / "train.jsonl"),
            "eval_path": str(tmp_path / "eval.jsonl"),
            "source_name": "${oc.env:MY_SECRET}",
        },
        "train": {
            "checkpoint": {"output_dir": str(tmp_path / "run")},
            "wandb": {"enable": True, "project": "p", "name": "n", "tags": ["t"]},
            "profile": {"enable": True, "trace_dir": str(tmp_path / "trace")},
        },
        "trainer": {
            "accelerator": "cpu",
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}},
            "callbacks": [
                {"class_path": "EarlyStopping", "init_args": {"monitor": "eval_loss"}},
                {"class_path": "LearningRateMonitor"},
                {"class_path": "ModelCheckpoint", "init_args": {"monitor": "eval_loss"}},
            ],
        },
    }


def build(tmp_path: Path, config: dict[str, Any], verb: Any = "fit") -> OmniCLI:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return OmniCLI(make_plan(verb, read_command(["--config", str(tmp_path / "run.yaml")])))


@pytest.fixture
def _no_service_stays() -> Iterator[None]:
    yield
    wandb.teardown()


def callbacks_of(cli: OmniCLI) -> list[Callback]:
    return vars(cli.trainer)["callbacks"]


@pytest.mark.usefixtures("_no_service_stays")
def test_samples_come_before_the_metrics_that_hold_their_cost(tmp_path, config):
    assert EvalSamples not in map(type, callbacks_of(build(tmp_path, config)))
    config["train"] |= {"eval_samples": 2, "wandb": {}}
    kinds = [type(callback) for callback in callbacks_of(build(tmp_path, config))]
    assert kinds.index(EvalSamples) < kinds.index(MetricsRecorder)


@pytest.mark.usefixtures("_no_service_stays")
def test_every_logger_gets_the_settings_and_none_a_secret(tmp_path, config):
    cli = build(tmp_path, config)
    loggers: list[Any] = cli.trainer.loggers
    callbacks = callbacks_of(cli)
    kinds = [type(logger) for logger in loggers]
    assert kinds == [TensorBoardLogger, CSVLogger, WandbLogger]
    trainer, module = SimpleNamespace(loggers=loggers), SimpleNamespace()
    try:
        for callback in callbacks:
            if isinstance(callback, HyperparameterLog | WandbRun):
                callback.on_fit_start(trainer, module)  # pyright: ignore[reportArgumentType]
        loggers[-1].log_metrics({"loss": 2.5}, step=1)
        run = loggers[-1].experiment
        assert (run.offline, run.project, run.name, run.tags) == (True, "p", "n", ("t",))
        assert run.config["data"]["source_name"] == "${oc.env:MY_SECRET}"
        assert run.config["train"]["seed"] == 42
        stored = json.loads((tmp_path / "run" / "wandb_run.json").read_text())
        assert stored == {"id": run.id}
    finally:
        for callback in callbacks:
            if isinstance(callback, WandbRun):
                callback.teardown(trainer, module, "fit")  # pyright: ignore[reportArgumentType]
        for logger in loggers:
            logger.finalize("success")
    for text in tmp_path.glob("*/**/hparams.yaml"):
        assert yaml.safe_load(text.read_text())["data"]["source_name"] == "${oc.env:MY_SECRET}"
    written = {path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    assert {path.suffix for path in written} >= {".wandb", ".yaml"}
    assert sum(path.name == "hparams.yaml" for path in written) == 2
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_callbacks_stand_in_the_order_that_each_asks_for(tmp_path, config):
    config["train"]["wandb"]["enable"] = False
    kinds = [type(callback) for callback in callbacks_of(build(tmp_path, config))]
    recorder, schedule = kinds.index(MetricsRecorder), kinds.index(EvaluationSchedule)
    for kind in (EarlyStopping, LearningRateMonitor):
        assert recorder < kinds.index(kind) < schedule
    for kind in (StepProfiler, GarbageCollector, CacheRelease):
        assert schedule < kinds.index(kind)
    assert kinds[-2:] == [ModelCheckpoint, CheckpointSaver]


def test_a_stock_checkpoint_saves_into_the_run_directory(tmp_path, config):
    config["train"]["wandb"]["enable"] = False
    (found,) = [c for c in callbacks_of(build(tmp_path, config)) if isinstance(c, ModelCheckpoint)]
    assert found.dirpath == str(tmp_path / "run" / "checkpoints")


def test_stock_callbacks_that_cannot_be_are_refused(tmp_path, config):
    del config["data"]["eval_path"]
    with pytest.raises(ConfigError, match="EarlyStopping watches eval_loss") as caught:
        build(tmp_path, config)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_trial_run_and_an_evaluation_begin_no_run_elsewhere(tmp_path, config, verb):
    if verb == "fit":
        config["trainer"]["fast_dev_run"] = True
    else:
        config["train"]["checkpoint"]["load_path"] = None
        config["model"]["model_path"] = config["model"]["config_path"]
    cli = build(tmp_path, config, verb)
    assert not [callback for callback in callbacks_of(cli) if isinstance(callback, WandbRun)]
    assert not (tmp_path / "run" / "wandb").exists()
