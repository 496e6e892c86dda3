"""What a run said to held-out prompts, from its first evaluation to its newest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from PIL import Image

from omnilit.checkpoint.layout import EVAL_MEDIA
from omnilit.data.media.pictures import Picture
from omnilit.tools.data_view import escape_controls
from omnilit.tools.page import render_pictures

MAX_STEPS: Final = 4  # evaluations of a prompt that are shown, of any number
MAX_PROMPTS: Final = 12
MAX_SIDE: Final = 2_000  # pixels; ours are far smaller
NAME: Final = re.compile(r"[0-9a-f]{16}\.(png|jpeg)")
Pictures = tuple[tuple[str, Path | None], ...]
TEXTS: Final = ("prompt", "expected", "completion")


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, and what was said to it.

    Args:
        prompt: As the model read it.
        expected: How it goes on in the data.
        completions: By step, ascending; the step is None where `validate` knew of none.
        pictures: Of what was seen or heard with the prompt: the caption of each and its file.
    """

    prompt: str
    expected: str
    completions: tuple[tuple[int | None, str], ...]
    pictures: Pictures = ()


def read_answers(file: Path, notes: list[str]) -> tuple[Answer, ...]:
    """The first prompts of a run, in their order.

    Args:
        file: `eval_samples.jsonl`, which may be missing.
        notes: What cannot be read is added here.
    """
    if not file.is_file():
        return ()
    said: dict[tuple[str, str, Pictures], dict[int | None, str]] = {}
    num_unreadable = 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _parse(text)
        if line is None:
            num_unreadable += 1
            continue
        prompt, expected, completion = (line[name] for name in TEXTS)
        pictures = tuple(_find_pictures(line.get("media"), file.with_name(EVAL_MEDIA)))
        said.setdefault((prompt, expected, pictures), {})[line["step"]] = completion
    if num_unreadable:
        notes.append(f"{file.name}: lines left out that cannot be read: {num_unreadable:,}")
    return tuple(
        Answer(
            prompt,
            expected,
            tuple(sorted(found.items(), key=lambda one: (one[0] is None, one[0] or 0))),
            pictures,
        )
        for (prompt, expected, pictures), found in list(said.items())[:MAX_PROMPTS]
    )


def render_answers(name: str, answers: Sequence[Answer]) -> str:
    """A section of the page; nothing of a run that has none.

    Args:
        name: Of the run.
        answers: From `read_answers`.
    """
    if not answers:
        return ""
    shown = "\n".join(map(_render, answers))
    return f'<h2>{escape(name)}: held-out prompts</h2>\n<div class="charts">{shown}</div>'


def choose_steps(number: int) -> list[int]:
    """Which of so many evaluations are shown: the first, the newest, and some between them."""
    if number <= MAX_STEPS:
        return list(range(number))
    return [round(index * (number - 1) / (MAX_STEPS - 1)) for index in range(MAX_STEPS)]


def _render(answer: Answer) -> str:
    parts = [("prompt", answer.prompt), ("expected", answer.expected)]
    for index in choose_steps(len(answer.completions)):
        step, text = answer.completions[index]
        parts.append(("completion" if step is None else f"step {step:,}", text))
    # a parser drops the first line break of <pre>, so one of ours goes before the text's own
    body = "".join(
        f"<h3>{title}</h3><pre>\n{escape(escape_controls(text))}</pre>" for title, text in parts
    )
    pictures = render_pictures([_open_picture(*one) for one in answer.pictures])
    return f'<div class="sample">{pictures}{body}</div>'


def _find_pictures(media: object, folder: Path) -> Iterator[tuple[str, Path | None]]:
    """Captions and files of a line; of a file only its own name counts."""
    for one in media if isinstance(media, list) else ():
        match one:
            case {"caption": str(caption), "file": str(name)} if NAME.fullmatch(name):
                yield caption, folder / name
            case {"caption": str(caption)}:
                yield caption, None


def _open_picture(caption: str, file: Path | None) -> Picture:
    if file is None:
        return Picture(caption)
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if max(image.size) > MAX_SIDE:
                return Picture(f"{caption}: {file.name} is too large to be shown")
            return Picture(caption, image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return Picture(f"{caption}: {file.name} cannot be read")


def _parse(text: str) -> dict[str, Any] | None:
    """A line of ours; None for one that is torn or another's."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in TEXTS):
        return None
    return line if isinstance(line.get("step", ""), int | None) else None
