"""The code blocks of the documentation, as a reader would write them to files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
FENCE: Final = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NAME: Final = re.compile(r"^(?:#|\{#-) ([\w./]+\.\w+)(?: -#\})?$")


class Block(NamedTuple):
    """A fenced block.

    Args:
        page: Name of its file.
        language: Behind the fence; empty for commands.
        name: The file that its first line names, if any.
        text: Its lines.
    """

    page: str
    language: str
    name: str
    text: str


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page."""
    found = []
    for indent, language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        text = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        named = NAME.match(text.partition("\n")[0])
        found.append(Block(page.name, language.strip(), named[1] if named else "", text))
    return found


def all_pages() -> list[Path]:
    """Every page of the site, the README beside them."""
    return [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


def write_guide(folder: Path) -> dict[str, Path]:
    """Write the named blocks of the guide and of the page on data; returns them by name."""
    written = {}
    for page in ("extending.md", "data.md"):
        for block in read_blocks(DOCS / page):
            if block.name:
                file = folder / block.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
                written[block.name] = file
    return written
