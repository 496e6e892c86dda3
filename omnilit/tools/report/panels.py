"""Which charts a page has, in which order and under which heading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from omnilit.tools.report.chart import Chart, Curve, Frame
from omnilit.tools.report.runs import Run

MAX_COLUMNS: Final = 280
MIN_COLUMNS: Final = 40
ALL_COLUMNS: Final = 16_000  # of all curves of a page, which keeps it below some megabytes


@dataclass(frozen=True, slots=True)
class Kind:
    """How a number of `metrics.jsonl` is drawn.

    Args:
        title: What it is.
        options: Further arguments of its chart.
    """

    title: str
    options: dict[str, Any]

    @classmethod
    def of(cls, title: str, **options: Any) -> Kind:
        """A kind with arguments of `Chart`."""
        return cls(title, options)


class Section(NamedTuple):
    """Charts under one heading."""

    title: str
    charts: tuple[Chart, ...]


KINDS: Final = {
    "loss": Kind.of("Loss", has_log=True, is_noisy=True),
    "eval_loss": Kind.of("Evaluation loss", has_log=True, is_sparse=True),
    "lr": Kind.of("Learning rate", has_zero=True),
    "grad_norm": Kind.of(
        "Gradient norm", unit="before clipping", has_zero=True, has_log=True, is_noisy=True
    ),
    "tokens_per_second": Kind.of("Throughput", unit="tokens/s", has_zero=True, is_noisy=True),
    "step_time_s": Kind.of("Step time", unit="s", has_zero=True, has_log=True, is_noisy=True),
    "data_wait_s": Kind.of(
        "Data wait", unit="s a step", has_zero=True, has_log=True, is_noisy=True
    ),
    "max_memory_gib": Kind.of("Memory, largest rank", unit="GiB", has_zero=True),
    "tflops_per_second": Kind.of(
        "Operations of all ranks", unit="TFLOP/s", has_zero=True, is_noisy=True
    ),
    "mfu": Kind.of("Model FLOPs utilisation", has_zero=True, is_noisy=True),
    "tokens": Kind.of("Supervised tokens", unit="a step", has_zero=True, is_noisy=True),
    "skipped_steps": Kind.of("Skipped steps", unit="so far", has_zero=True),
}
TRAINING: Final = "Training"
EVALUATION: Final = "Evaluation"
OTHERS: Final = "Other numbers"
# Headings of the numbers whose names begin so
GROUPS: Final = {
    "loss": "Loss by term",
    "eval_loss": "Evaluation loss by source",
    "source": "Data sources",
    "lr": "Learning rate by group",
    "grad_norm": "Gradient norm by part",
}
HIDDEN: Final = frozenset({"epoch"})


def build_sections(runs: Sequence[Run]) -> list[Section]:
    """All numbers of the runs as charts: the known ones first, then the rest by their names."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.series))
    known = [name for name in KINDS if name in names]
    rest = [name for name in names if name not in KINDS and name not in HIDDEN]
    found: dict[str, list[Chart]] = {}
    for name in (*known, *sorted(rest, key=_rank)):
        if (chart := _build_chart(name, runs)) is not None:
            found.setdefault(_heading(name), []).append(chart)
    if len(found.get(GROUPS["lr"], [])) == 1:  # the one group's rate is the rate
        del found[GROUPS["lr"]]
    return [Section(title, tuple(charts)) for title, charts in found.items()]


def build_frame(runs: Sequence[Run], sections: Iterable[Section]) -> Frame:
    """The steps of all runs, and how finely each of the curves may be drawn."""
    series = [one for run in runs for one in run.metrics.series.values()]
    low = min((int(one.steps[0]) for one in series), default=0)
    high = max((int(one.steps[-1]) for one in series), default=0)
    num_curves = sum(len(chart.curves) for section in sections for chart in section.charts)
    columns = ALL_COLUMNS // max(num_curves, 1)
    return Frame(low, high, min(max(columns, MIN_COLUMNS), MAX_COLUMNS))


def _build_chart(name: str, runs: Sequence[Run]) -> Chart | None:
    """The chart of a number; None where no run has a finite value of it."""
    curves = [
        Curve(index, run.metrics.series[name], run.resumed_at)
        for index, run in enumerate(runs)
        if run.metrics.finite(name) is not None
    ]
    if name == "skipped_steps" and not any(curve.series.values.any() for curve in curves):
        return None
    kind = _kind(name)
    return Chart(kind.title, tuple(curves), **kind.options) if curves else None


def _kind(name: str) -> Kind:
    if name in KINDS:
        return KINDS[name]
    group, _, part = name.partition("/")
    source, _, what = part.rpartition("/")
    if group in KINDS:
        return Kind(f"{KINDS[group].title}: {part}", KINDS[group].options)
    if what in KINDS:
        return Kind(f"{KINDS[what].title}: {source}", KINDS[what].options)
    is_loss = name.endswith("loss")
    return Kind.of(name, has_log=is_loss, is_noisy=not name.startswith("eval"))


def _heading(name: str) -> str:
    group, separator, _ = name.partition("/")
    if name in KINDS:
        return TRAINING
    if separator:
        return GROUPS.get(group, group)
    return EVALUATION if name.startswith("eval_") else OTHERS


def _rank(name: str) -> tuple[int, str]:
    """Groups in their order, then everything else by name."""
    headings = [*GROUPS.values(), EVALUATION]
    heading = _heading(name)
    return (headings.index(heading) if heading in headings else len(headings), name)
