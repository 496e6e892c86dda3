"""Where checkpoints lie, how they appear all at once, and which one a run goes on from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from omnilit.checkpoint.manifest import (
    COMPLETE,
    Seal,
    find_damage,
    sync_folder,
    write_complete,
)
from omnilit.errors import ConfigError
from omnilit.logging import get_logger

CHECKPOINTS: Final = "checkpoints"
METRICS: Final = "metrics.jsonl"
EVAL_SAMPLES: Final = "eval_samples.jsonl"
EVAL_MEDIA: Final = "eval_media"
TENSORBOARD: Final = "tensorboard"
WANDB_RUN: Final = "wandb_run.json"
RUN_PARTS: Final = (CHECKPOINTS, METRICS, EVAL_SAMPLES, TENSORBOARD, WANDB_RUN)
HF_FOLDER: Final = "hf_ckpt"
MODEL_ASSETS: Final = "model_assets"
STAGING: Final = ".staging-"
REPLACED: Final = ".replaced-"
LOAD_KEY: Final = "train.checkpoint.load_path"
OUTPUT_KEY: Final = "train.checkpoint.output_dir"
KEEP_KEY: Final = "train.checkpoint.keep_last"
logger = get_logger(__name__)


def checkpoints_folder(output_dir: Path) -> Path:
    """The folder that holds all steps of a run."""
    return output_dir / CHECKPOINTS


def step_folder(output_dir: Path, step: int) -> Path:
    """The folder of one optimizer step."""
    return checkpoints_folder(output_dir) / f"global_step_{step}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says, be it published or staged."""
    match = re.fullmatch(r"(?:\.staging-)?global_step_(\d+)", folder.name)
    return int(match[1]) if match else None


def staging_of(final: Path) -> Path:
    """Where a folder is written before it appears under its own name."""
    return final.with_name(f"{STAGING}{final.name}")


def stage(final: Path) -> Path:
    """Make the empty folder in which `final` is written; leftovers of a killed run go first.

    Among a run's checkpoints those are all staged and replaced folders, since one run at a time
    writes there; elsewhere, such as in a folder of the user's, only those of `final` itself.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    is_ours = final.parent.name == CHECKPOINTS
    for leftover in final.parent.iterdir():
        name = leftover.name.removeprefix(STAGING).removeprefix(REPLACED)
        if name != leftover.name and (is_ours or name == final.name):
            _remove(leftover)
    staging = staging_of(final)
    staging.mkdir()
    return staging


def _remove(moved: Path) -> None:
    """Remove a staged or replaced folder; an export in it goes home, under the folder's own name.

    What cannot be removed, such as a file that is open on a network disk, is left to the next
    time.
    """
    export = moved / HF_FOLDER
    if export.is_dir():
        home = moved.with_name(moved.name.removeprefix(STAGING).removeprefix(REPLACED))
        home.mkdir(exist_ok=True)
        if not (home / HF_FOLDER).exists():
            export.rename(home / HF_FOLDER)
    shutil.rmtree(moved, ignore_errors=True)


def publish(staging: Path, final: Path, seals: Mapping[str, Seal]) -> None:
    """Complete a staged folder and let it appear under its own name in one rename.

    What stands there already is replaced; its `hf_ckpt` moves along.

    Args:
        staging: Written whole, every file synced.
        final: On the same file system.
        seals: Of every file in `staging`.
    """
    write_complete(staging, seals)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        if (final / HF_FOLDER).exists():
            (final / HF_FOLDER).rename(staging / HF_FOLDER)
        final.rename(replaced)
    staging.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(newest: Path, *, keep: int) -> None:
    """Remove all but the newest checkpoints of a run; their exports stay.

    Whatever happens, a checkpoint is there whole or gone: it loses its name first. One that
    cannot be removed is reported, and tried again after the next save.

    Args:
        newest: Has just been published, so the run can go on from it; it stays.
        keep: How many stay, `newest` included.
    """
    steps = _steps(newest.parent.parent, newest_first=True)
    others = [p for p in steps if p != newest and _is_published(p)]
    for folder in others[max(keep - 1, 0) :]:
        replaced = folder.with_name(f"{REPLACED}{folder.name}")
        try:
            folder.rename(replaced)
            _remove(replaced)
        except OSError as error:
            logger.warning("%s: %s cannot be removed: %s", KEEP_KEY, folder, error.strerror)
    sync_folder(newest.parent)


def _is_published(folder: Path) -> bool:
    return not folder.name.startswith(STAGING) and (folder / COMPLETE).is_file()


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search for the newest checkpoint.

    Args:
        path: The newest good one, or None.
        passed_over: Newer ones that cannot be used, newest first, each with the reason.
    """

    path: Path | None
    passed_over: tuple[tuple[Path, str], ...] = ()


def find_latest(output_dir: Path) -> Found:
    """Find the newest step whose files are all as they were written.

    Folders that hold an export alone are no checkpoints and not mentioned.
    """
    passed_over: list[tuple[Path, str]] = []
    for folder in _steps(output_dir, newest_first=True):
        reason = find_damage(folder)
        if reason is None and not folder.name.startswith(STAGING):
            return Found(folder, tuple(passed_over))
        passed_over.append((folder, reason or "the run ended before it was published"))
    return Found(None, tuple(passed_over))


def _steps(output_dir: Path, *, newest_first: bool = False) -> list[Path]:
    folder = checkpoints_folder(output_dir)
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if step_of(p) is not None and not is_export_only(p)]
    return sorted(steps, key=lambda p: (step_of(p) or 0, p.name), reverse=newest_first)


def is_export_only(folder: Path) -> bool:
    """Whether a step was exported, or was being exported, and not saved."""
    names = {path.name for path in folder.iterdir()}
    return bool(names) and names <= {HF_FOLDER, f"{STAGING}{HF_FOLDER}", f"{REPLACED}{HF_FOLDER}"}


def resolve_load_path(load_path: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that a run goes on from.

    Args:
        load_path: `train.checkpoint.load_path`: null, `auto` or a global_step folder.
        output_dir: `train.checkpoint.output_dir`, where `auto` looks.

    Returns:
        A folder whose files are good, or None to start anew.

    Raises:
        ConfigError: The folder given is not there or no good checkpoint.
    """
    if load_path is None:
        return None
    if load_path == "auto":
        found = find_latest(output_dir)
        for path, reason in found.passed_over:
            logger.warning("%s: auto passes over %s: %s", LOAD_KEY, path, reason)
        logger.info("%s: auto goes on from %s", LOAD_KEY, found.path or "the start: nothing saved")
        return found.path
    path = Path(load_path).expanduser()
    if not path.is_dir():
        raise ConfigError(
            key=LOAD_KEY,
            problem=f"{path} does not exist",
            fix=f"give auto, or one of: {_list_steps(path.parent.parent, output_dir)}",
        )
    if (reason := find_damage(path)) is not None:
        raise ConfigError(
            key=LOAD_KEY,
            problem=f"{path} cannot be loaded: {reason}",
            fix=f"give auto, or one of: {_list_steps(path.parent.parent, output_dir, path)}",
        )
    return path


def _list_steps(near: Path, output_dir: Path, but: Path | None = None) -> str:
    steps = _steps(near) or _steps(output_dir)
    complete = [str(s) for s in steps if (s / COMPLETE).is_file() and s != but]
    return ", ".join(complete) or "none is there"


def is_own_checkpoint(folder: Path, output_dir: Path) -> bool:
    """Whether `folder` lies among the checkpoints of `output_dir`, links followed."""
    return folder.resolve().is_relative_to(checkpoints_folder(output_dir).resolve())


def holds_run(output_dir: Path) -> bool:
    """Whether a run left checkpoints, or the numbers of its steps, in `output_dir`."""
    metrics = output_dir / METRICS
    return _holds_checkpoints(output_dir) or (metrics.is_file() and metrics.stat().st_size > 0)


def _holds_checkpoints(output_dir: Path) -> bool:
    folder = checkpoints_folder(output_dir)
    return folder.is_dir() and any(folder.iterdir())


def check_fresh(output_dir: Path, *, overwrite: bool, load_path: Path | None = None) -> None:
    """Keep a run that starts anew out of another run's checkpoints.

    Args:
        output_dir: `train.checkpoint.output_dir`.
        overwrite: Another run's checkpoints may be moved aside.
        load_path: A checkpoint that lies elsewhere and that the run starts from.

    Raises:
        ConfigError: There are checkpoints and `overwrite` is false.
    """
    if overwrite or not _holds_checkpoints(output_dir):
        return
    loaded = "null" if load_path is None else f"{load_path}, which is not one of them"
    raise ConfigError(  # in the words of the check before the run
        key=OUTPUT_KEY,
        problem=f"{checkpoints_folder(output_dir)} holds the checkpoints of another run, and "
        f"load_path is {loaded}",
        fix="go on with that run by load_path: auto, choose another output_dir, or give "
        "--train.checkpoint.overwrite true",
    )


def move_run_aside(output_dir: Path) -> None:
    """Rename all that an earlier run left to `<name>.<k>`, with one k for all of it."""
    number = _free_number(output_dir, RUN_PARTS)
    moved = [path for path in (output_dir / name for name in RUN_PARTS) if path.exists()]
    for path in moved:
        path.rename(path.with_name(f"{path.name}.{number}"))
    names = ", ".join(f"{path.name}.{number}" for path in moved)
    logger.warning("%s: what another run left in %s is now in %s", OUTPUT_KEY, output_dir, names)


def move_later_steps(output_dir: Path, *, step: int, loaded: Path) -> None:
    """Move every step after `step` to `checkpoints.<k>`, its export with it.

    A run that goes on from an older checkpoint abandons the newer ones: left in place, they would
    be what the next `auto` goes on from.

    Args:
        output_dir: `train.checkpoint.output_dir`.
        step: The step that the run goes on from.
        loaded: The checkpoint of that step; it stays whatever its name says.
    """
    folder = checkpoints_folder(output_dir)
    later = [p for p in folder.iterdir() if (step_of(p) or 0) > step and not p.samefile(loaded)]
    if not later:
        return
    later.sort(key=lambda path: step_of(path) or 0, reverse=True)
    aside = folder.with_name(f"{folder.name}.{_free_number(output_dir, (folder.name,))}")
    aside.mkdir()
    for path in later:  # the newest first: whenever this is cut off, no gap is left
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in reversed(later))
    logger.warning("%s: the run goes on from step %d: %s moved to %s", LOAD_KEY, step, names, aside)


def _free_number(output_dir: Path, names: Iterable[str]) -> int:
    """The smallest k for which no `<name>.<k>` is there."""
    listed = list(names)
    return next(k for k in count(1) if not any((output_dir / f"{n}.{k}").exists() for n in listed))


def check_writable(output_dir: Path, *, num_bytes: int = 0) -> None:
    """Find out before the first step that `output_dir` cannot take a checkpoint.

    Args:
        output_dir: Made when it is not there.
        num_bytes: Size of one checkpoint.

    Raises:
        ConfigError: It cannot be made or written to, or has less room than that.
    """
    probe = output_dir / f"{STAGING}probe"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            key=OUTPUT_KEY,
            problem=f"{output_dir} cannot be written to ({error.strerror})",
            fix="give a folder with room that this user may write to",
        ) from error
    free = shutil.disk_usage(output_dir).free
    if free < num_bytes:
        raise ConfigError(
            key=OUTPUT_KEY,
            problem=f"{output_dir} has {free / 2**30:.1f} GiB free, one checkpoint takes "
            f"{num_bytes / 2**30:.1f}",
            fix="make room, or give another output_dir",
        )
