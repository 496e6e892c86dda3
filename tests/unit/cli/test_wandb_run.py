"""One run there for one run here, resumed with it, and nothing secret sent."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch import Callback

from omnilit.checkpoint.layout import step_folder
from omnilit.cli.wandb_run import check_wandb, open_wandb
from omnilit.config import WandbConfig
from omnilit.config.schema import dataclass_fields
from omnilit.config.train import TrainingArguments
from omnilit.config.view import View
from omnilit.errors import ConfigError

Given = dict[str, Any]


class FakeRun(SimpleNamespace):
    """What `wandb.init` gives, kept in this process."""

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        self.metrics.append((*args, kwargs))

    def finish(self, exit_code: int = 0) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """Stands for wandb; holds what each run was begun with."""
    begun: list[Given] = []

    def init(**settings: Any) -> FakeRun:
        begun.append({name: value for name, value in settings.items() if value is not None})
        run_id = settings["id"] or f"new{len(begun)}"
        return FakeRun(id=run_id, metrics=[], ends=[])

    monkeypatch.setattr(wandb, "init", init)
    return begun


def begin(out: Path, load_path: Path | None = None, **config: Any) -> str:
    """A run whose `fit` begins and ends well; its id."""
    run = open_wandb(WandbConfig(enable=True, **config), out, load_path=load_path)
    trainer: Any = SimpleNamespace()
    module: Any = Callback()
    run.on_fit_start(trainer, module)
    run.teardown(trainer, module, "fit")
    assert run.logger.experiment.ends == [0]
    return str(run.logger.version)


def test_a_run_is_begun_with_what_the_configuration_says(service, tmp_path):
    begin(
        tmp_path, project="p", name="n", id="i", group="g", tags=["a", "b"], entity="team"
    )  # fmt: skip
    assert service == [
        {
            "project": "p", "name": "n", "id": "i", "resume": "allow", "group": "g",
            "tags": ["a", "b"], "entity": "team", "dir": str(tmp_path),
        }
    ]  # fmt: skip


def test_metrics_are_drawn_over_the_step(service, tmp_path):
    run = open_wandb(WandbConfig(enable=True), tmp_path, load_path=None)
    step = "trainer/global_step"
    overall = ("*", {"step_metric": step, "step_sync": True})
    assert run.logger.experiment.metrics == [(step, {}), overall]


def test_a_resumed_run_goes_on_in_the_same_run_there(service, tmp_path):
    first = begin(tmp_path)
    own = step_folder(tmp_path, 4)
    own.mkdir(parents=True)
    assert begin(tmp_path, own) == begin(tmp_path, own) == first == "new1"
    assert [run.get("resume") for run in service] == [None, "allow", "allow"]


@pytest.mark.parametrize("content", ["", '{"id": ', "[]", "{}", "7", b"\xff"])
def test_a_stored_id_that_cannot_be_read_is_a_wrong_setting(content, service, tmp_path):
    own = step_folder(tmp_path, 4)
    own.mkdir(parents=True)
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "wandb_run.json").write_bytes(raw)
    with pytest.raises(
        ConfigError, match=r"train\.wandb\.id: .*wandb_run\.json, which names the run"
    ):
        begin(tmp_path, own)
    assert not service
    assert begin(tmp_path, own, id="mine") == "mine"


def test_a_run_that_starts_anew_is_a_new_run_there(service, tmp_path):
    assert begin(tmp_path) == "new1"
    assert begin(tmp_path) == "new2"
    elsewhere = step_folder(tmp_path / "other", 4)
    elsewhere.mkdir(parents=True)
    assert begin(tmp_path, elsewhere) == "new3"
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": "new3"}


def test_an_id_that_is_given_counts_more_than_the_one_of_the_directory(service, tmp_path):
    own = step_folder(tmp_path, 4)
    own.mkdir(parents=True)
    begin(tmp_path)
    assert begin(tmp_path, own, id="mine") == "mine"
    assert begin(tmp_path, own) == "mine"


def test_a_run_that_fails_is_a_failed_run_there(service, tmp_path):
    run = open_wandb(WandbConfig(enable=True), tmp_path, load_path=None)
    nothing: Any = None
    run.on_exception(nothing, nothing, RuntimeError())
    assert run.logger.experiment.ends == [1]


def test_a_missing_login_is_a_wrong_setting(monkeypatch, tmp_path):
    def init(**_: Any) -> None:
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError) as caught:
        open_wandb(WandbConfig(enable=True), tmp_path, load_path=None)
    assert str(caught.value) == (
        "train.wandb.enable: wandb does not start: No API key configured. Use `wandb login` to log "
        "in. To fix: run `wandb login`, or log on this machine alone by the variable "
        "WANDB_MODE=offline, or set this to false."
    )


def problems(given: Given, trainer: Given, verb: Any = "fit") -> list[str]:
    fields = dataclass_fields(TrainingArguments, "train")
    view = View({field.path: field for field in fields}, given, verb=verb)
    return [str(problem) for problem in check_wandb(view, trainer)]


def test_what_leaves_it_without_effect_is_found_before_the_run(monkeypatch):
    given = {"train.wandb.enable": True}
    assert problems(given, {}) == problems({}, {"logger": False}) == []
    assert problems(given, {"logger": False}, "validate") == []
    assert problems(given, {"logger": False}) == [
        (
            "train.wandb.enable: has no effect, because trainer.logger: false turns all loggers "
            "off. To fix: leave trainer.logger out, or set this to false."
        )
    ]

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert problems(given, {}) == [
        (
            "train.wandb.enable: the package wandb is not installed. To fix: pip install "
            "'omnilit[loggers]', or set this to false."
        )
    ]
