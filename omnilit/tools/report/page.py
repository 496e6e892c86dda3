"""The report of several runs as one page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from omnilit import __version__
from omnilit.tools.data_report import Table
from omnilit.tools.page import SAMPLES_LEGEND, build_document, render_sample, render_table
from omnilit.tools.report.answers import render_answers
from omnilit.tools.report.chart import RANGES, Frame, draw_chart
from omnilit.tools.report.panels import Section, build_frame, build_sections
from omnilit.tools.report.runs import Run
from omnilit.tools.report.settings import find_differences
from omnilit.tools.report.summary import (
    describe_origins,
    list_bad,
    list_evaluations,
    list_saved,
    summarize,
)

if TYPE_CHECKING:  # it imports all that reads data, which a page without samples can do without
    from omnilit.tools.report.samples import SharedSamples

NUM_COLOURS: Final = 7
DASHES: Final = ("none", "60 40", "15 35", "90 30 15 30")
MAX_OPEN: Final = 12  # charts of a section that is open at first
STYLE: Final = "style.css"
SCRIPT: Final = "hover.js"


def build_page(runs: Sequence[Run], samples: Iterable[SharedSamples] = ()) -> str:
    """The page.

    Args:
        runs: At least one.
        samples: Of their data.
    """
    sections = build_sections(runs)
    frame = build_frame(runs, sections)
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        _header(title, runs),
        _beside(_table(summarize(runs)), _differences(runs)),
        *([_bar(runs, frame)] if sections else []),
        *(_section(section, frame) for section in sections),
        *(render_answers(run.name, run.answers) for run in runs),
        _configurations(runs),
        *(_samples(shared) for shared in samples),
        _beside(*(_found(run) for run in runs)),
        _origins(runs),
    ]
    here = files("omnilit.tools.report")
    style = (here / STYLE).read_text("utf-8") + _run_style(len(runs))
    script = (here / SCRIPT).read_text("utf-8")
    return build_document(title, "\n".join(filter(None, body)), style=style, script=script)


def _header(title: str, runs: Sequence[Run]) -> str:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    lines = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    folders = ", ".join(str(run.folder.resolve()) for run in runs)
    made = f"<p>{escape(folders)}; omnilit {__version__}</p>"
    return f"<header><h1>{escape(title)}</h1>{made}{lines}</header>"


def _bar(runs: Sequence[Run], frame: Frame) -> str:
    """The legend, whose boxes hide runs, and the choices that hold for all charts."""
    legend = "".join(
        f'<label class="k{index}"><input type="checkbox" id="run{index}" checked><i></i>'
        f"{escape(run.name)}</label>"
        for index, run in enumerate(runs)
    )
    smoothings = ["off", *(f"{window} steps" for window in frame.windows)]
    return (
        '<form class="bar" autocomplete="off">'
        f'<fieldset class="legend">{legend}</fieldset>'
        f"{_choice('smooth', 'Smoothing', smoothings, chosen=1)}"
        f"{_choice('range', 'Show', [name for name, _ in RANGES], chosen=0)}</form>"
    )


def _choice(name: str, title: str, labels: Iterable[str], *, chosen: int) -> str:
    options = "".join(
        f'<label><input type="radio" name="{name}" id="{name}{index}"'
        f"{' checked' if index == chosen else ''}>{escape(label)}</label>"
        for index, label in enumerate(labels)
    )
    return f"<fieldset><legend>{title}</legend>{options}</fieldset>"


def _section(section: Section, frame: Frame) -> str:
    charts = "\n".join(draw_chart(chart, frame) for chart in section.charts)
    is_open = " open" if len(section.charts) <= MAX_OPEN else ""
    title = f"<summary><h2>{escape(section.title)}</h2></summary>"
    return f'<details{is_open}>{title}<div class="charts">{charts}</div></details>'


def _differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ; nothing of one run."""
    if len(runs) == 1:
        return ""
    title, rows = "Settings that differ", tuple(find_differences([run.settings for run in runs]))
    if not rows:
        is_compared = sum(run.settings.problem is None for run in runs) > 1
        reason = "None." if is_compared else "There are not two configurations to compare."
        return f"<h2>{title}</h2><p>{reason}</p>"
    table = Table(title, ("", *(run.name for run in runs)), rows)
    return render_table(table, kind="words runs")


def _configurations(runs: Sequence[Run]) -> str:
    """Each whole configuration, to open."""
    parts = ["<h2>Configurations</h2>"]
    for run in runs:
        if run.settings.problem is not None:
            parts.append(f"<p>{escape(run.name)}: {escape(run.settings.problem)}.</p>")
        else:
            parts.append(
                f"<details><summary>{escape(run.name)}</summary>"
                f'<pre class="yaml">\n{escape(run.settings.text)}</pre></details>'
            )
    return "\n".join(parts)


def _samples(shared: SharedSamples) -> str:
    head = f"<h2>Training data of {escape(', '.join(shared.runs))}</h2>"
    if shared.problem is not None:
        return f"{head}<p>No samples can be shown: {escape(shared.problem)}</p>"
    shown = "\n".join(render_sample(sample) for sample in shared.samples)
    return f'{head}<p>{SAMPLES_LEGEND}</p><div class="charts">{shown}</div>'


def _found(run: Run) -> str:
    """Tables of what lies in the folder of a run."""
    parts = []
    if run.saved:
        parts.append(render_table(list_saved(run), kind="words"))
    else:
        parts.append(f"<h2>{escape(run.name)}: checkpoints and exports</h2><p>None is there.</p>")
    if run.evaluations:
        parts.append(render_table(list_evaluations(run), kind="words"))
    if run.bad:
        parts.append(render_table(list_bad(run), kind="words"))
    return "\n".join(parts)


def _origins(runs: Sequence[Run]) -> str:
    table = describe_origins(runs)
    return _table(table) or f"<h2>{table.title}</h2><p>No complete checkpoint tells them.</p>"


def _beside(*parts: str) -> str:
    """Parts next to each other, where there is room."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def _table(table: Table) -> str:
    return render_table(table, kind="runs") if table.rows else ""


def _run_style(num_runs: int) -> str:
    """Colour and dash of each run, and the rule by which its box hides it."""
    rules = []
    for index in range(num_runs):
        colour, dash = index % NUM_COLOURS, DASHES[index // NUM_COLOURS % len(DASHES)]
        rules.append(
            f".r{index}, .k{index} {{ --run: var(--run{colour}); --dash: {dash}; }}\n"
            f"body:has(#run{index}:not(:checked)) .r{index} {{ display: none; }}\n"
            f".runs th:nth-child({index + 2}) {{ border-bottom: 3px solid var(--run{colour}); }}\n"
        )
    return "".join(rules)
