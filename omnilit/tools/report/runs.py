"""What is in the folder of a run, as far as it is there and can be read."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

from omnilit.checkpoint.layout import (
    CHECKPOINTS,
    EVAL_SAMPLES,
    HF_FOLDER,
    METRICS,
    STAGING,
    checkpoints_folder,
    step_of,
)
from omnilit.checkpoint.manifest import COMPLETE
from omnilit.checkpoint.save import META, read_meta
from omnilit.data.quarantine import FILE as QUARANTINE
from omnilit.data.quarantine import BadRecord, read_quarantine
from omnilit.errors import CheckpointError, ConfigError, Problem
from omnilit.tools.report.answers import Answer, read_answers
from omnilit.tools.report.metrics import Metrics, SetAside, read_metrics, read_set_aside
from omnilit.tools.report.settings import FILE as CONFIG
from omnilit.tools.report.settings import Settings, read_settings

RUN_KEY: Final = "RUN_DIR"
MARKS: Final = (METRICS, CONFIG, "config.yaml", CHECKPOINTS)
MAX_SUGGESTED: Final = 5
MAX_BAD: Final = 5  # bad records of a run that are shown, of any number


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A step among the checkpoints of a run.

    Args:
        name: Of its folder.
        step: The optimizer step.
        state: `complete`, or what it is instead.
        has_export: Whether a complete export for transformers is in it.
        num_bytes: Of all its files.
    """

    name: str
    step: int
    state: str
    has_export: bool
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint says about the processes that wrote it.

    Args:
        world_size: Number of ranks.
        versions: By package.
        kernels: What ran each operation, by field of `model.ops_implementation`.
    """

    world_size: int
    versions: dict[str, str]
    kernels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder.

    Args:
        name: What it is called on the page.
        folder: Where it is.
        metrics: The numbers of its steps.
        set_aside: Lines that earlier starts left.
        settings: Its configuration.
        saved: Its checkpoints and exports, by step.
        origin: From the newest checkpoint that can be read; None without one.
        bad_counts: Records that were skipped, by source.
        bad: The first of them.
        evaluations: The lines that `validate` wrote.
        answers: What was said to held-out prompts.
        written_at: When its newest line of metrics was written; None without one.
        notes: What cannot be read, and why.
    """

    name: str
    folder: Path
    metrics: Metrics
    set_aside: tuple[SetAside, ...]
    settings: Settings
    saved: tuple[SavedStep, ...]
    origin: Origin | None
    bad_counts: dict[str, int]
    bad: tuple[BadRecord, ...]
    evaluations: tuple[dict[str, Any], ...]
    answers: tuple[Answer, ...]
    written_at: datetime | None
    notes: tuple[str, ...]

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps after which it went on with lines set aside; of those that say which."""
        firsts = [aside.first_step for aside in self.set_aside if aside.is_resume]
        return tuple(sorted({first - 1 for first in firsts if first is not None}))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run.

    Raises:
        ConfigError: Folders that hold no run, or the same one again, all of them together; or a
            file that this user may not read.
    """
    problems = [problem for folder in folders if (problem := _check_run(folder)) is not None]
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            problems.append(Problem(RUN_KEY, f"{folder} is given twice", "leave one out"))
        seen.add(folder.resolve())
    if problems:
        raise ConfigError.of(problems)
    names = name_runs(folders)
    try:
        return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    except OSError as error:
        raise ConfigError(
            key=RUN_KEY,
            problem=f"{error.filename} cannot be read: {error.strerror}",
            fix="make it readable, or leave this run out",
        ) from error


def name_runs(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return [str(Path(*path[-length:])) for path in parts]


def read_run(folder: Path, name: str) -> Run:
    """Read one run, whatever is missing.

    Args:
        folder: Holds some part of a run.
        name: What it is called on the page.
    """
    notes: list[str] = []
    saved = _list_saved(folder)
    counts, bad = _read_bad(folder / QUARANTINE, notes)
    metrics = read_metrics(folder / METRICS)
    file = folder / METRICS
    if not file.is_file():
        notes.append(f"{METRICS} is missing")
    elif not metrics.series:
        notes.append(f"{METRICS} holds no step yet")
    if metrics.num_unreadable:
        notes.append(f"{METRICS}: lines left out that cannot be read: {metrics.num_unreadable:,}")
    written_at = datetime.fromtimestamp(file.stat().st_mtime, UTC) if metrics.series else None
    return Run(
        name,
        folder,
        metrics,
        tuple(read_set_aside(folder)),
        read_settings(folder),
        tuple(saved),
        _read_origin(folder, saved, notes),
        counts,
        bad,
        tuple(_read_evaluations(folder / "eval.jsonl", notes)),
        read_answers(folder / EVAL_SAMPLES, notes),
        written_at,
        tuple(notes),
    )


def _check_run(folder: Path) -> Problem | None:
    if not folder.is_dir():
        problem = f"{folder} does not exist" if not folder.exists() else f"{folder} is a file"
        return Problem(RUN_KEY, problem, "give the folder that train.checkpoint.output_dir names")
    if _holds_run(folder):
        return None
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    near = [str(path) for path in (*folder.absolute().parents[:2], *below) if _holds_run(path)]
    fix = "give the folder that train.checkpoint.output_dir names"
    if near:
        fix = f"give {' or '.join(near[:MAX_SUGGESTED])}"
    return Problem(RUN_KEY, f"{folder} holds no run: neither {', '.join(MARKS)} is there", fix)


def _holds_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def _list_saved(folder: Path) -> list[SavedStep]:
    steps = checkpoints_folder(folder)
    paths = [path for path in steps.iterdir() if path.is_dir()] if steps.is_dir() else []
    found = []
    for path in paths:
        if (step := step_of(path)) is not None:
            has_export = (path / HF_FOLDER / COMPLETE).is_file()
            state, num_bytes = _state_of(path), _count_bytes(path)
            found.append(SavedStep(path.name, step, state, has_export, num_bytes))
    return sorted(found, key=lambda saved: (saved.step, saved.name))


def _count_bytes(folder: Path) -> int:
    """Size of all files; a run that is still going on may rename and remove some meanwhile."""
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                num_bytes += (Path(parent) / name).stat().st_size
    return num_bytes


def _state_of(folder: Path) -> str:
    if folder.name.startswith(STAGING):
        return "not finished"
    if (folder / COMPLETE).is_file():
        return "complete"
    return "incomplete" if (folder / META).is_file() else "export alone"


def _read_origin(folder: Path, saved: Sequence[SavedStep], notes: list[str]) -> Origin | None:
    """What the newest readable checkpoint says of its processes."""
    for step in reversed([step for step in saved if step.state == "complete"]):
        try:
            meta = read_meta(checkpoints_folder(folder) / step.name)
            by = meta["saved_by"]
            kernels = meta.get("omnilit", {}).get("kernels", {})
            return Origin(by["world_size"], dict(by["versions"]), dict(kernels))
        except (CheckpointError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{step.name} does not say who wrote it: {error}")
    return None


def _read_bad(file: Path, notes: list[str]) -> tuple[dict[str, int], tuple[BadRecord, ...]]:
    """Skipped records counted by source, and the first few of them."""
    try:
        records = read_quarantine(file)
        first = tuple(islice(records, MAX_BAD))
        counts = Counter(record.source for record in first)
        counts.update(record.source for record in records)
    except OSError as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}, ()
    return dict(counts), first


def _read_evaluations(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # torn, or nothing of ours
            notes.append(f"{file.name}: a line cannot be read and is left out")
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
