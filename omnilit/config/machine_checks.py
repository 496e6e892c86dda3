"""Checks that look at files: paths that are read, and the folder that is written."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from omnilit.config.hub import HUB_ID, may_be_hub_data
from omnilit.config.view import View
from omnilit.errors import Problem

MIN_FREE_BYTES: Final = 64 * 2**20  # below this not even logs and a tiny checkpoint fit
OUTPUT: Final = "train.checkpoint.output_dir"


def check_paths(view: View) -> list[Problem]:
    """Problems of the paths that the run reads: missing ones, and files in place of folders.

    And of the folder of the traces, which needs to hold nothing yet.

    A name like `org/model` that is no path here is left to the hub.
    """
    read = {
        "fit": (
            _check_model,
            _check_training_data,
            _check_evaluation_data,
            _check_resume,
            _check_trace_dir,
        ),
        "validate": (_check_model, _check_evaluation_data, _check_resume),
        "infer": (_check_answering_model,),
        "data": (_check_model, _check_training_data, _check_evaluation_data),
    }[view.verb]
    return [problem for check in read for problem in check(view)]


def check_output_dir(view: View) -> list[Problem]:
    """Problems of writing to `output_dir`, found by writing a small file and removing it.

    Nothing is created: where the folder is not there yet, its nearest parent is tried.
    """
    if view.verb == "infer":
        return []
    folder = Path(view[OUTPUT]).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return [Problem(OUTPUT, f"{there} is not a folder", "choose another output_dir")]
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".omnilit-probe-") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        problem = f"cannot write to {there}: {error.strerror}"
        return [Problem(OUTPUT, problem, "make it writable, or choose another output_dir")]
    if free < MIN_FREE_BYTES:
        problem = f"only {free / 2**20:.0f} MiB are free in {there}"
        return [Problem(OUTPUT, problem, "free some space, or choose another output_dir")]
    return []


def check_other_run(view: View) -> list[Problem]:
    """A problem where a new run would write beside another run's checkpoints."""
    group = "train.checkpoint"
    if view.verb != "fit" or view[f"{group}.load_path"] or view[f"{group}.overwrite"]:
        return []
    folder = Path(view[OUTPUT]) / "checkpoints"
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    return [
        Problem(
            OUTPUT,
            f"{folder} holds the checkpoints of another run, and load_path is null",
            "go on with that run by load_path: auto, choose another output_dir, or give "
            "--train.checkpoint.overwrite true",
        )
    ]


def _check_model(view: View) -> list[Problem]:
    paths = ("model.model_path", "model.config_path", "model.tokenizer_path")
    problems = [problem for path in paths for problem in _check_hub_path(view, path)]
    index = "model.safetensor_idx_path"
    if index in view and view[index] and not Path(view[index]).expanduser().is_file():
        fix = "give the model.safetensors.index.json of a model, or leave it out"
        problems.append(Problem(index, f"{view[index]} is no file", fix))
    return problems


def _check_answering_model(view: View) -> list[Problem]:
    paths = ("infer.model_path", "infer.tokenizer_path")
    return [problem for path in paths for problem in _check_hub_path(view, path)]


def _check_hub_path(view: View, path: str) -> list[Problem]:
    if path not in view or not view[path]:
        return []
    name: str = view[path]
    if not Path(name).exists():
        if HUB_ID.fullmatch(name):
            return []
        fix = "give an existing path, or a hub id like org/name"
        return [Problem(path, f"{name} does not exist", fix)]
    if Path(name).is_file() and not path.endswith("config_path"):
        return [Problem(path, f"{name} is a file", f"give its folder: {Path(name).parent}")]
    return []


def _check_training_data(view: View) -> list[Problem]:
    return _check_data(view, "data.train_path")


def _check_evaluation_data(view: View) -> list[Problem]:
    return _check_data(view, "data.eval_path")


def _check_data(view: View, path: str) -> list[Problem]:
    """Missing files; what lies elsewhere is found out when it is read."""
    if path not in view or not view[path]:
        return []
    if view["data.datasets_type"] not in ("mapping", "iterable"):
        return []  # a reader of the user's own knows what its path means
    if Path(view[path]).exists():
        return []
    names = [name.strip() for name in view[path].split(",")]
    return [
        Problem(path, f"{name or 'an empty name'} does not exist", "give existing files or folders")
        for name in names
        if not name or not _is_there(name)
    ]


def _is_there(name: str) -> bool:
    """Whether a path exists, a pattern matches, or it is the name of something elsewhere."""
    if "://" in name or Path(name).exists():
        return True
    if glob.has_magic(name):
        return next(glob.iglob(name, recursive=True), None) is not None  # noqa: PTH207 - any root
    return Path(name.partition("#")[0]).is_dir() or may_be_hub_data(name)


def _check_resume(view: View) -> list[Problem]:
    path = "train.checkpoint.load_path"
    name = view[path]
    if not name or name == "auto" or Path(name).is_dir():
        return []
    problem = f"{name} is not a folder" if Path(name).exists() else f"{name} does not exist"
    return [Problem(path, problem, "give the folder of a checkpoint (global_step_N), or auto")]


def _check_trace_dir(view: View) -> list[Problem]:
    path = "train.profile.trace_dir"
    if not view["train.profile.enable"]:
        return []
    folder = Path(view[path]).absolute()
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if there.is_dir() and os.access(there, os.W_OK):
        return []
    problem = f"{there} is not a folder" if not there.is_dir() else f"{there} is read-only"
    return [Problem(path, problem, "choose another folder")]
