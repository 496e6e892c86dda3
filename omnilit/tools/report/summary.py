"""What runs came to, in tables: one column a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from omnilit.tools.data_report import BAD_HEADER, Table, bad_rows
from omnilit.tools.report.axis import format_value
from omnilit.tools.report.metrics import Floats
from omnilit.tools.report.runs import Run

LAST_SHARE: Final = 0.1
NOTHING: Final = "-"
NOT_FINITE: Final = "not finite"
Cell = Callable[[Run], str | None]


def summarize(runs: Sequence[Run]) -> Table:
    """The numbers that are compared first; what no run has is left out."""
    cells: dict[str, Cell] = {
        "last step": _last_step,
        "loss, last step": lambda run: _last(run, "loss"),
        f"loss, mean of the last {LAST_SHARE:.0%} of steps": _late_loss,
        "evaluation loss, last": lambda run: _last(run, "eval_loss"),
        "evaluation loss, best": _best_evaluation,
        "supervised tokens": lambda run: _count(_sum(run, "tokens")),
        "tokens in all": lambda run: _count(_count_tokens(run)),
        "time in steps": lambda run: format_time(_sum(run, "step_time_s")),
        "tokens/s, median": lambda run: _middle(run, "tokens_per_second"),
        "step time, median s": lambda run: _middle(run, "step_time_s"),
        "waiting for data": _wait_share,
        "peak memory, GiB": lambda run: _peak(run, "max_memory_gib"),
        "mfu, median": lambda run: _middle(run, "mfu"),
        "skipped steps": lambda run: _last(run, "skipped_steps"),
        "numbers that are not finite": _odd_numbers,
        "resumes that redid steps": _resumes,
        "earlier runs set aside": _earlier_runs,
        "bad records skipped": lambda run: _count(sum(run.bad_counts.values()) or None),
        "newest line": lambda run: run.written_at and f"{run.written_at:%Y-%m-%d %H:%M} UTC",
    }
    return _table("Summary", cells, runs)


def describe_origins(runs: Sequence[Run]) -> Table:
    """Processes, versions and kernels, as the newest checkpoint of each run says."""
    origins = [run.origin for run in runs if run.origin is not None]
    packages = dict.fromkeys(name for origin in origins for name in origin.versions)
    slots = dict.fromkeys(name for origin in origins for name in origin.kernels)
    cells: dict[str, Cell] = {"processes": lambda run: run.origin and str(run.origin.world_size)}
    for package in packages:
        cells[package] = lambda run, p=package: run.origin and run.origin.versions.get(p)
    for slot in slots:
        cells[slot] = lambda run, s=slot: run.origin and run.origin.kernels.get(s)
    return _table("Processes, versions and kernels", cells, runs)


def list_saved(run: Run) -> Table:
    """The checkpoints and exports of a run."""
    rows = [
        (
            saved.name,
            saved.state,
            "hf_ckpt" if saved.has_export else NOTHING,
            format_bytes(saved.num_bytes),
        )
        for saved in run.saved
    ]
    header = ("checkpoint", "state", "export", "size")
    return Table(f"{run.name}: checkpoints and exports", header, tuple(rows))


def list_bad(run: Run) -> Table:
    """The first of the records that a run skipped, and how many there are of each source."""
    counts = ", ".join(f"{source} {number:,}" for source, number in run.bad_counts.items())
    return Table(f"{run.name}: bad records skipped ({counts})", BAD_HEADER, bad_rows(run.bad))


def list_evaluations(run: Run) -> Table:
    """What `validate` found."""
    names = dict.fromkeys(name for line in run.evaluations for name in line)
    rows = tuple(tuple(_show(line.get(name)) for name in names) for line in run.evaluations)
    return Table(f"{run.name}: evaluations by validate", tuple(names), rows)


def format_time(seconds: float | None) -> str | None:
    """Hours, minutes and seconds: 1:02:03; below a minute one decimal: 5.2 s."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def format_bytes(number: int) -> str:
    """A size in the largest unit that it fills: 1.5 MiB."""
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _table(title: str, cells: dict[str, Cell], runs: Iterable[Run]) -> Table:
    listed = list(runs)
    rows = [(label, [cell(run) for run in listed]) for label, cell in cells.items()]
    kept = tuple(
        (label, *(value or NOTHING for value in values)) for label, values in rows if any(values)
    )
    return Table(title, ("", *(run.name for run in listed)), kept)


def _last_step(run: Run) -> str | None:
    return f"{run.metrics.last_step:,}" if run.metrics.series else None


def _last(run: Run, name: str) -> str | None:
    one = run.metrics.series.get(name)
    return None if one is None else _show_mean(one.values[-1:])


def _late_loss(run: Run) -> str | None:
    one = run.metrics.series.get("loss")
    if one is None:
        return None
    number = max(round(LAST_SHARE * len(one.values)), 1)
    return _show_mean(one.values[-number:])


def _show_mean(values: Floats) -> str:
    """The mean of those that are finite: what a run that diverged had before is not its end."""
    finite = values[np.isfinite(values)]
    return format_value(float(finite.mean()), digits=5) if len(finite) else NOT_FINITE


def _best_evaluation(run: Run) -> str | None:
    one = run.metrics.finite("eval_loss")
    if one is None:
        return None
    best = int(one.values.argmin())
    return f"{format_value(float(one.values[best]), digits=5)} at step {one.steps[best]:,}"


def _sum(run: Run, name: str) -> float | None:
    one = run.metrics.finite(name)
    return None if one is None else float(one.values.sum())


def _count_tokens(run: Run) -> float | None:
    """Real tokens of all ranks: those of a second, times the seconds, of every step with both."""
    rate, time = run.metrics.finite("tokens_per_second"), run.metrics.finite("step_time_s")
    if rate is None or time is None:
        return None
    _, in_rate, in_time = np.intersect1d(rate.steps, time.steps, return_indices=True)
    return float((rate.values[in_rate] * time.values[in_time]).sum())


def _count(number: float | None) -> str | None:
    return None if number is None else f"{number:,.0f}"


def _middle(run: Run, name: str) -> str | None:
    one = run.metrics.finite(name)
    if one is None:
        return None
    middle = float(np.median(one.values))
    return _count(middle) if middle >= 1000 else format_value(middle)


def _peak(run: Run, name: str) -> str | None:
    one = run.metrics.finite(name)
    return None if one is None else format_value(float(one.values.max()))


def _wait_share(run: Run) -> str | None:
    wait, time = _sum(run, "data_wait_s"), _sum(run, "step_time_s")
    return f"{wait / time:.1%} of the time" if wait is not None and time else None


def _odd_numbers(run: Run) -> str | None:
    """How many values of each number were not finite, and where the first one was."""
    found = []
    for name, one in run.metrics.series.items():
        odd = one.steps[~one.is_finite]
        if len(odd):
            found.append(f"{name} {len(odd):,}, first at step {odd[0]:,}")
    return "; ".join(found) or None


def _resumes(run: Run) -> str | None:
    number = sum(aside.is_resume for aside in run.set_aside)
    steps = ", ".join(f"{step:,}" for step in run.resumed_at)
    return f"{number}, after step {steps}" if steps else str(number) if number else None


def _earlier_runs(run: Run) -> str | None:
    number = sum(not aside.is_resume for aside in run.set_aside)
    return str(number) if number else None


def _show(value: object) -> str:
    if isinstance(value, float):
        return format_value(value, digits=5)
    return NOTHING if value is None else str(value)
