from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnilit.config import machine_checks
from omnilit.config.machine_checks import check_other_run, check_output_dir, check_paths
from omnilit.config.schema import Field
from omnilit.config.view import View

OUTPUT = "train.checkpoint.output_dir"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a data file and a folder of data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    return tmp_path


def _view(fields: list[Field], given: dict[str, Any], **options: Any) -> View:
    return View({field.path: field for field in fields}, given, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model.model_path": "./gone"}, ("model.model_path: ./gone does not exist. To fix: give "
         "an existing path, or a hub id like org/name.")),
        ({"model.config_path": "gone"}, "model.config_path: gone does not exist"),
        ({"model.tokenizer_path": "/gone/x"}, "model.tokenizer_path: /gone/x does not exist"),
        ({"model.model_path": "model/config.json"}, ("model.model_path: model/config.json is a "
         "file. To fix: give its folder: model.")),
        ({"data.train_path": "a.jsonl,b.jsonl"}, ("data.train_path: b.jsonl does not exist. To "
         "fix: give existing files or folders.")),
        ({"data.train_path": "a.jsonl,"}, "data.train_path: an empty name does not exist"),
        ({"data.eval_path": "b.jsonl"}, "data.eval_path: b.jsonl does not exist"),
        ({"data.train_path": "gone/b.csv.gz"}, "data.train_path: gone/b.csv.gz does not exist"),
        ({"data.train_path": "data/trian"}, ("data.train_path: data/trian does not exist. To fix: "
         "give existing files or folders.")),
        ({"data.train_path": "data/trian#dev"}, "data.train_path: data/trian#dev does not exist"),
        ({"data.train_path": "gone/a.txt"}, "data.train_path: gone/a.txt does not exist"),
        ({"data.train_path": "gone/a.jsonl#dev"}, "data.train_path: gone/a.jsonl#dev does not"),
        ({"data.train_path": "gone/*.jsonl"}, "data.train_path: gone/*.jsonl does not exist"),
        ({"train.checkpoint.load_path": "gone"}, ("train.checkpoint.load_path: gone does not "
         "exist. To fix: give the folder of a checkpoint (global_step_N), or auto.")),
        ({"train.checkpoint.load_path": "a.jsonl"}, ("train.checkpoint.load_path: a.jsonl is not a "
         "folder")),
    ],
)  # fmt: skip
def test_a_missing_or_wrong_path_is_named(
    given: dict[str, Any], message: str, fields: list[Field], here: Path
):
    (problem,) = check_paths(_view(fields, given))
    assert str(problem).startswith(message)


def test_paths_that_are_there_and_hub_ids_are_good(fields: list[Field], here: Path):
    given = {
        "model.model_path": "org/name-1.5",
        "model.config_path": "model/config.json",
        "model.tokenizer_path": "model",
        "data.train_path": "a.jsonl, data",
        "data.eval_path": str(here / "data"),
        "train.checkpoint.load_path": "auto",
    }
    assert not check_paths(_view(fields, given))


@pytest.mark.parametrize(
    "path",
    [
        "org/name",
        "org/name-v1.5#validation",
        "data#dev",
        "s3://bucket/*.jsonl",
        "*.jsonl,data",
        "data/../a*",
    ],
)
def test_data_that_lies_elsewhere_or_matches_a_pattern_is_good(
    path: str, fields: list[Field], here: Path
):
    given = {"model.config_path": "model", "data.train_path": path}
    assert not check_paths(_view(fields, given))


def test_the_path_of_a_reader_of_the_users_own_is_left_to_it(fields: list[Field], here: Path):
    given = {"model.config_path": "model", "data.train_path": "any thing"}
    assert check_paths(_view(fields, given))
    for name in ("mine:Reader", "registered"):
        assert not check_paths(_view(fields, given | {"data.datasets_type": name}))


def test_each_verb_checks_only_what_it_reads(fields: list[Field], here: Path):
    given = {"model.config_path": "gone", "data.train_path": "gone", "infer.model_path": "gone"}
    found = {
        verb: [problem.key for problem in check_paths(_view(fields, given, verb=verb))]
        for verb in ("fit", "validate", "infer")
    }
    assert found == {
        "fit": ["model.config_path", "data.train_path"],
        "validate": ["model.config_path"],
        "infer": ["infer.model_path"],
    }


@pytest.mark.parametrize("name", ["out", "out/deeper", "."])
def test_a_writable_output_dir_is_good_and_nothing_is_left_behind(
    name: str, fields: list[Field], here: Path
):
    before = sorted(here.rglob("*"))
    assert not check_output_dir(_view(fields, {OUTPUT: name}))
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl/out"])
def test_a_file_in_the_way_of_the_output_dir_is_named(name: str, fields: list[Field], here: Path):
    (problem,) = check_output_dir(_view(fields, {OUTPUT: name}))
    assert str(problem) == (
        f"{OUTPUT}: {here / 'a.jsonl'} is not a folder. To fix: choose another output_dir."
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_output_dir_is_found_by_writing(
    number: int, fields: list[Field], here: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(machine_checks.os, "fsync", refuse)
    (problem,) = check_output_dir(_view(fields, {OUTPUT: "out"}))
    assert str(problem) == (
        f"{OUTPUT}: cannot write to {here}: {os.strerror(number)}. "
        "To fix: make it writable, or choose another output_dir."
    )
    assert not list(here.glob(".omnilit-probe-*"))


def test_a_folder_that_cannot_be_written_is_refused(fields: list[Field], here: Path):
    # a folder of the kernel's takes no files, from root neither; a mode would not stop root
    (problem,) = check_output_dir(_view(fields, {OUTPUT: "/proc/self/task"}))
    assert "cannot write to /proc/self/task" in problem.problem


def test_an_output_dir_with_almost_no_space_is_refused(
    fields: list[Field], here: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = SimpleNamespace(free=3 * 2**20)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: usage)
    (problem,) = check_output_dir(_view(fields, {OUTPUT: "out"}))
    assert str(problem) == (
        f"{OUTPUT}: only 3 MiB are free in {here}. "
        "To fix: free some space, or choose another output_dir."
    )


def test_another_runs_checkpoints_are_named_with_both_ways_on(fields: list[Field], here: Path):
    (here / "output" / "checkpoints" / "global_step_4").mkdir(parents=True)
    (problem,) = check_other_run(_view(fields, {}))
    assert str(problem) == (
        f"{OUTPUT}: output/checkpoints holds the checkpoints of another run, and load_path is "
        "null. To fix: go on with that run by load_path: auto, choose another output_dir, or give "
        "--train.checkpoint.overwrite true."
    )
    for given in ({"load_path": "auto"}, {"overwrite": True}, {"output_dir": "new"}):
        paths = {f"train.checkpoint.{key}": value for key, value in given.items()}
        assert not check_other_run(_view(fields, paths))
    assert not check_other_run(_view(fields, {}, verb="validate"))


def test_an_empty_checkpoints_folder_is_nobodys(fields: list[Field], here: Path):
    (here / "output" / "checkpoints").mkdir(parents=True)
    assert not check_other_run(_view(fields, {}))
