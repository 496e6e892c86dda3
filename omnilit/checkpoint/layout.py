"""Where checkpoints lie, how they appear all at once, and which one a run goes on from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from omnilit.checkpoint.manifest import (
    COMPLETE,
    Seal,
    find_damage,
    sync_folder,
    write_complete,
)
from omnilit.errors import CheckpointError, ConfigError
from omnilit.logging import get_logger

HF_FOLDER: Final = "hf_ckpt"
STAGING: Final = ".staging-"
REPLACED: Final = ".replaced-"
LOAD_KEY: Final = "train.checkpoint.load_path"
OUTPUT_KEY: Final = "train.checkpoint.output_dir"
logger = get_logger(__name__)


def checkpoints_folder(output_dir: Path) -> Path:
    """The folder that holds all steps of a run."""
    return output_dir / "checkpoints"


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
    """Make the empty folder in which `final` is written; leftovers of a killed run go first."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.iterdir():
        if leftover.name.startswith((STAGING, REPLACED)):
            _remove_leftover(leftover)
    staging = staging_of(final)
    staging.mkdir()
    return staging


def _remove_leftover(leftover: Path) -> None:
    export = leftover / HF_FOLDER
    if export.is_dir():  # killed while the export moved along: give it back
        home = leftover.with_name(leftover.name.removeprefix(STAGING).removeprefix(REPLACED))
        home.mkdir(exist_ok=True)
        if not (home / HF_FOLDER).exists():
            export.rename(home / HF_FOLDER)
    shutil.rmtree(leftover)


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
    steps = [p for p in folder.iterdir() if step_of(p) is not None and not _is_export_only(p)]
    return sorted(steps, key=lambda p: (step_of(p) or 0, p.name), reverse=newest_first)


def _is_export_only(folder: Path) -> bool:
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


def check_fresh(output_dir: Path, *, overwrite: bool) -> None:
    """Keep a new run out of another run's checkpoints.

    Args:
        output_dir: `train.checkpoint.output_dir` of a run with `load_path: null`.
        overwrite: Move the other run's checkpoints aside, to `checkpoints.<k>`.

    Raises:
        ConfigError: There are checkpoints and `overwrite` is false.
    """
    folder = checkpoints_folder(output_dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:4])
        raise ConfigError(
            key=OUTPUT_KEY,
            problem=f"{folder} holds checkpoints of another run ({names})",
            fix="set train.checkpoint.load_path: auto to go on with it, give another output_dir, "
            "or start over with --train.checkpoint.overwrite true",
        )
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning("%s: the checkpoints of another run are now in %s", OUTPUT_KEY, aside)


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


def prune(output_dir: Path, keep_last: int | None) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints; exports stay.

    Returns:
        The folders whose checkpoint was removed; none where `keep_last` is None.

    Raises:
        CheckpointError: A folder cannot be removed.
    """
    if keep_last is None:
        return []
    complete = [folder for folder in _steps(output_dir) if (folder / COMPLETE).is_file()]
    removed = complete[: max(len(complete) - keep_last, 0)]
    try:
        for folder in removed:
            _remove_checkpoint(folder)
    except OSError as error:
        raise CheckpointError(f"an old checkpoint cannot be removed: {error}") from error
    return removed


def _remove_checkpoint(folder: Path) -> None:
    (folder / COMPLETE).unlink()  # first, so that a kill leaves no half that looks whole
    for path in folder.iterdir():
        if path.is_dir() and path.name != HF_FOLDER:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
