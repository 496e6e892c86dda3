"""What was found of every architecture, as a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import transformers

from tests.sweep.judge import DIFFERS, YES
from tests.sweep.subject import EXPORT, LANGUAGE, PACKED, SHARDED, Subject

SPLIT: Final = "on 2 ranks"  # in place of columns that were not reached
NO_EXPERTS: Final = "has no experts to split"
TEXT_INTRO: Final = """\
# Models

`make sweep` wrote this page. It builds every architecture of `AutoModelForCausalLM` (transformers
{version}) in a tiny configuration, trains it on rows of packed sequences in float32, and holds loss
and gradients against transformers alone: one sequence at a time, eager attention, float64. What
differs by more than 1e-4, and what float32 takes transformers itself off, fails the sweep.
On two processes the model is sharded (FSDP2), its
experts (EP), matrices (TP), sequences (Ulysses) or layers (PP) are split, and what FSDP2 gathers is
exported, loaded by transformers again and compared to the bit. Activations are recomputed where a
model can.

- {passed} of {total} architectures train packed, {sharded} of them with FSDP2 and an exact export.
- Of {ep_plans} among them that transformers has an expert-parallel plan for, {ep} train with EP.
- With TP {tp}, with Ulysses {ulysses}, with PP {pp}.

An architecture is what a configuration's `model_type` says; several share a class of models. A dash
stands for a configuration that names no number of experts, a number for the reason below the table.
"""
MEDIA_INTRO: Final = """\
# Models with images, videos and sounds

`make sweep` wrote this page. It builds every architecture of `AutoModelForImageTextToText`
(transformers {version}) in a tiny configuration and trains it as `VLMModule` does, in float32, on
a row of packed samples with one image, two images, a video and a sound where the model takes such,
and a row of text alone. Loss and gradients, those of the towers too, are held against transformers
alone: one sample at a time, eager attention, float64. What differs by more than 1e-4, and
what float32 takes transformers itself off, fails the sweep. On two
processes the model is sharded (FSDP2, where one rank has no media), its experts (EP),
matrices (TP) or sequences (Ulysses) are split, and what FSDP2 gathers is exported, loaded by
transformers again and compared to the bit. Activations are recomputed where a model can.

- {passed} of {total} architectures train packed, {sharded} of them with FSDP2 and an exact export.
- Of {ep_plans} among them that transformers has an expert-parallel plan for, {ep} train with EP.
- With TP {tp}, with Ulysses {ulysses}.

What their media look like is made after what the model's own code asks for; no processor is needed.
A dash stands for a configuration that names no number of experts, a number for the reason below the
table.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of an architecture.

    Args:
        model_type: A key of transformers' mapping.
        columns: By name why not, `YES` where it does; nothing where it was not tried.
    """

    model_type: str
    columns: Mapping[str, str]

    @property
    def is_wrong(self) -> bool:
        """Whether it does something else than it should, rather than being refused."""
        return any(why.startswith(DIFFERS) for why in self.columns.values())

    @property
    def is_trained(self) -> bool:
        """Whether it trains packed."""
        return self.columns.get(PACKED) == YES

    def has(self, column: str) -> bool:
        """Whether it was tried and works."""
        return self.columns.get(column) == YES

    def in_a_line(self) -> str:
        """For the terminal."""
        shown = [f"{name}: {why or 'yes'}" for name, why in self.columns.items()]
        return f"{self.model_type}: {'; '.join(shown)}"


def update_page(path: Path, verdicts: Sequence[Verdict], *, subject: Subject = LANGUAGE) -> None:
    """Put what was found in place of what the page says of the same architectures."""
    before = read_page(path.read_text("utf-8"), subject=subject) if path.exists() else []
    known = {verdict.model_type: verdict for verdict in (*before, *verdicts)}
    found = [known[name] for name in subject.architectures() if name in known]
    path.write_text(page_of(found, subject=subject))


def page_of(verdicts: Sequence[Verdict], *, subject: Subject = LANGUAGE) -> str:
    """The whole page."""
    trained = [verdict for verdict in verdicts if verdict.is_trained]
    reasons: dict[str, int] = {}
    lines = [
        _row(["family", "class", *subject.columns]),
        _row(["---"] * (len(subject.columns) + 2)),
        *(_trained_row(verdict, reasons, subject) for verdict in trained),
    ]
    with_plan = [verdict for verdict in trained if has_plan(verdict)]
    intro = (MEDIA_INTRO if subject.takes_media else TEXT_INTRO).format(
        version=transformers.__version__,
        passed=len(trained),
        total=len(verdicts),
        sharded=sum(verdict.has(SHARDED) and verdict.has(EXPORT) for verdict in trained),
        ep_plans=len(with_plan),
        ep=sum(verdict.has("EP") for verdict in with_plan),
        **{name.lower(): sum(v.has(name) for v in trained) for name in ("TP", "Ulysses", "PP")},
    )
    refused = [
        _row(
            [f"`{v.model_type}`", f"`{subject.class_of(v.model_type)}`", _plain(v.columns[PACKED])]
        )
        for v in verdicts
        if not v.is_trained
    ]
    parts = [
        intro,
        "## Trained\n",
        "\n".join(lines) + "\n",
        "\n".join(f"{number}. {why}" for why, number in reasons.items()) + "\n",
        "## Refused\n",
        "\n".join([_row(["family", "class", "why"]), _row(["---"] * 3), *refused]) + "\n",
    ]
    return "\n".join(parts)


def read_page(text: str, *, subject: Subject = LANGUAGE) -> list[Verdict]:
    """What a page says of the architectures; `page_of` makes the same page of it."""
    trained, _, refused = text.partition("## Trained\n")[2].partition("## Refused\n")
    numbered = re.findall(r"^(\d+)\. (.*)$", trained, flags=re.MULTILINE)
    reasons = {"yes": YES, "-": NO_EXPERTS, **dict(numbered)}
    verdicts = []
    for name, _, *cells in _cells(trained):
        columns = dict(zip(subject.columns, (reasons[cell] for cell in cells), strict=True))
        verdicts.append(Verdict(name, columns))
    verdicts += [Verdict(name, {PACKED: why}) for name, _, why in _cells(refused)]
    return sorted(verdicts, key=lambda verdict: verdict.model_type)


def _cells(table: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def has_plan(verdict: Verdict) -> bool:
    """Whether transformers says how its experts are split."""
    why = verdict.columns.get("EP", "")
    return NO_EXPERTS not in why and "does not say how the experts" not in why


def _trained_row(verdict: Verdict, reasons: dict[str, int], subject: Subject) -> str:
    cells = [f"`{verdict.model_type}`", f"`{subject.class_of(verdict.model_type)}`"]
    for column in subject.columns:
        why = verdict.columns.get(column, verdict.columns.get(SPLIT, YES))
        if why == YES:
            cells.append("yes")
        elif NO_EXPERTS in why:
            cells.append("-")
        else:
            cells.append(str(reasons.setdefault(_plain(why), len(reasons) + 1)))
    return _row(cells)


def _plain(why: str) -> str:
    """A reason as the text of a cell."""
    return why.replace("|", "/").replace("\n", " ")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
