"""The run directory: whose checkpoints and curves are in it, and what a start leaves there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import GenerationConfig

from omnilit.checkpoint.layout import find_latest, publish, stage, step_folder
from omnilit.checkpoint.manifest import files_below, seal_files
from omnilit.cli.run_folder import RunFiles, RunFolder
from omnilit.data.media.processor import find_processor
from omnilit.errors import CheckpointError, ConfigError
from tests.helpers.processors import build_processor


class Assets:
    """Stands for a model's configuration or its tokenizer."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        if self.error is not None:
            raise self.error
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")


def start(
    out: Path,
    *,
    load_path: Path | None = None,
    overwrite: bool = False,
    stage: str = "fit",
    trial: bool = False,
    loggers: tuple[TensorBoardLogger, ...] = (),
    config: Any = None,
    error: BaseException | None = None,
    model_path: str | None = None,
    processor: Any = None,
) -> None:
    """What Lightning calls when a run begins, and when it ends."""
    trainer: Any = SimpleNamespace(is_global_zero=True, fast_dev_run=int(trial), loggers=loggers)
    module: Any = SimpleNamespace(
        shard_files=None,
        model_config=Assets(error),
        tokenizer=Assets(),
        processor=processor,
        model_path=model_path,
    )
    written = config or {"train": {"seed": 1}}
    folder = RunFolder(RunFiles(out, written, {}, load_path=load_path, is_overwrite=overwrite))
    try:
        folder.setup(trainer, module, stage)
    finally:
        folder.teardown(trainer, module, stage)


def save(out: Path, step: int) -> Path:
    final = step_folder(out, step)
    staging = stage(final)
    (staging / "meta.pt").write_text("meta")
    publish(staging, final, seal_files(staging, files_below(staging)))
    return final


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step_")) for path in folder.iterdir())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in files_below(folder)}


@pytest.fixture
def curves(tmp_path: Path) -> Iterator[TensorBoardLogger]:
    logger = TensorBoardLogger(save_dir=tmp_path, name="tensorboard", version="")
    yield logger
    logger.finalize("success")


def test_a_run_that_goes_on_from_an_older_step_is_what_auto_finds_later(tmp_path):
    older, _ = save(tmp_path, 300), save(tmp_path, 600)
    start(tmp_path, load_path=older)
    assert steps(tmp_path / "checkpoints") == [300]
    assert steps(tmp_path / "checkpoints.1") == [600]
    newest = save(tmp_path, 400)  # killed here
    assert find_latest(tmp_path).path == newest


def test_a_new_run_does_not_keep_the_id_of_the_earlier_runs_logger(tmp_path):
    save(tmp_path, 300)
    (tmp_path / "wandb_run.json").write_text('{"id": "old"}')
    start(tmp_path, overwrite=True)
    assert not (tmp_path / "wandb_run.json").exists()
    assert (tmp_path / "wandb_run.json.1").is_file()


def test_a_resume_from_the_newest_step_moves_nothing(tmp_path):
    save(tmp_path, 300)
    newest = save(tmp_path, 600)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    start(tmp_path, load_path=newest)
    assert steps(tmp_path / "checkpoints") == [300, 600]
    assert not list(tmp_path.glob("*.1"))


def test_another_runs_checkpoint_starts_a_new_run_in_an_empty_folder(tmp_path):
    loaded = save(tmp_path / "first", 300)
    start(tmp_path / "second", load_path=loaded)
    assert (tmp_path / "second" / "config.yaml").is_file()
    assert steps(tmp_path / "first" / "checkpoints") == [300]


def test_another_runs_checkpoint_does_not_mix_with_those_of_a_third(tmp_path):
    loaded, out = save(tmp_path / "first", 300), tmp_path / "third"
    save(out, 200)
    with pytest.raises(ConfigError, match=r"third/checkpoints holds .* of another run.*first/chec"):
        start(out, load_path=loaded)
    assert steps(out / "checkpoints") == [200]
    start(out, load_path=loaded, overwrite=True)
    assert steps(out / "checkpoints.1") == [200]
    assert not (out / "checkpoints").exists()
    assert loaded.is_dir()


def test_a_checkpoint_that_was_moved_aside_can_be_gone_back_to(tmp_path):
    save(tmp_path, 300)
    shutil.move(tmp_path / "checkpoints", tmp_path / "checkpoints.1")
    save(tmp_path, 200)
    loaded = tmp_path / "checkpoints.1" / "global_step_300"
    start(tmp_path, load_path=loaded, overwrite=True)
    assert steps(tmp_path / "checkpoints.2") == [200]
    assert loaded.is_dir()


def test_a_run_killed_in_its_first_save_can_be_started_again_by_auto(tmp_path):
    stage(step_folder(tmp_path, 5))
    start(tmp_path)  # auto found nothing that it can use
    assert (tmp_path / "checkpoints.1").is_dir()
    save(tmp_path, 5)
    with pytest.raises(ConfigError, match="load_path is null"):
        start(tmp_path)


def test_overwriting_moves_checkpoints_numbers_and_curves_together(tmp_path, curves):
    save(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.of.old").write_text("old")
    _ = curves.experiment  # Lightning opens loggers before the first hook
    start(tmp_path, overwrite=True, loggers=(curves,))
    for name in ("checkpoints", "metrics.jsonl", "tensorboard"):
        assert not (tmp_path / name).exists()
        assert (tmp_path / f"{name}.1").exists()
    assert (tmp_path / "tensorboard.1" / "events.of.old").is_file()
    before = everything(tmp_path / "tensorboard.1")
    curves.log_metrics({"loss": 1.0}, step=1)
    curves.finalize("success")
    assert len(list((tmp_path / "tensorboard").glob("events.out.*"))) == 1
    assert everything(tmp_path / "tensorboard.1") == before


def test_a_run_that_was_killed_before_its_first_save_leaves_its_curves_aside(tmp_path, curves):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    curves.log_metrics({"loss": 1.0}, step=1)
    start(tmp_path, loggers=(curves,))
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "tensorboard.1").is_dir()
    assert (tmp_path / "metrics.jsonl.1").is_file()


def test_a_first_start_keeps_the_curve_that_its_logger_has_opened(tmp_path, curves):
    _ = curves.experiment
    start(tmp_path, loggers=(curves,))
    curves.log_metrics({"loss": 1.0}, step=1)
    assert len(list((tmp_path / "tensorboard").glob("events.out.*"))) == 1
    assert not list(tmp_path.glob("*.1"))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_trial_run_leaves_the_folder_of_a_real_one_as_it_is(tmp_path, stage):
    start(tmp_path)
    save(tmp_path, 300)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = everything(tmp_path)
    start(tmp_path, overwrite=True, trial=True, stage=stage, config={"other": 1})
    assert everything(tmp_path) == before
    start(tmp_path / "new", trial=True, stage=stage)
    assert not (tmp_path / "new").exists()


def test_an_evaluation_writes_no_configuration_and_moves_nothing(tmp_path):
    older, _ = save(tmp_path, 300), save(tmp_path, 600)
    start(tmp_path, load_path=older, stage="validate")
    assert steps(tmp_path / "checkpoints") == [300, 600]
    assert not (tmp_path / "config.yaml").exists()


def test_another_configuration_moves_the_one_before_to_a_number(tmp_path):
    loaded = save(tmp_path, 3)
    for seed in (1, 1, 2):
        start(tmp_path, load_path=loaded, config={"train": {"seed": seed}})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"train": {"seed": 2}}
    assert yaml.safe_load((tmp_path / "config.yaml.1").read_text()) == {"train": {"seed": 1}}
    assert not (tmp_path / "config.yaml.2").exists()


def test_the_models_own_generation_settings_lie_beside_its_configuration(tmp_path):
    GenerationConfig(do_sample=True, top_k=7).save_pretrained(tmp_path / "model")
    start(tmp_path / "run", model_path=str(tmp_path / "model"))
    assets = tmp_path / "run" / "model_assets"
    assert GenerationConfig.from_pretrained(assets).top_k == 7
    start(tmp_path / "run")  # another model, which has none
    assert not (assets / "generation_config.json").exists()


def test_the_processor_of_a_model_that_sees_lies_beside_its_configuration(tmp_path):
    start(tmp_path, processor=build_processor())
    found = find_processor(str(tmp_path / "model_assets"))
    assert type(found).__name__ == "Qwen3VLProcessor"


def test_the_folder_is_given_back_after_the_last_write_into_it(tmp_path):
    trainer: Any = SimpleNamespace(is_global_zero=True, fast_dev_run=0, loggers=())
    module: Any = SimpleNamespace()
    folder = RunFolder(RunFiles(tmp_path, {}, {}, load_path=None, is_overwrite=False))
    folder.setup(trainer, module, "validate")
    held = []
    told = SimpleNamespace(on_exception=lambda _: held.append(folder._lock))
    trainer.strategy = told
    folder.on_exception(trainer, module, RuntimeError())
    assert held[0] is not None
    assert folder._lock is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "model_assets").write_text("in the way")
    with pytest.raises(CheckpointError, match=rf"preparing {tmp_path} failed: .*model_assets"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "expected"),
    [
        (None, ValueError("invalid generation config"), ValueError),
        ({"train": {"odd": object()}}, None, yaml.YAMLError),
    ],
)
def test_what_is_not_our_error_is_raised_as_it_is(tmp_path, config, error, expected):
    with pytest.raises(expected):
        start(tmp_path, config=config, error=error)
