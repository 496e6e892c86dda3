"""What stands in place of `<!-- generated: NAME -->` on a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from sitegen.arguments import arguments_page, refused_table, status_table
from sitegen.messages import CHECKPOINTS, DATA, SETTINGS, TRAINING, Message, find_messages

PLACE: Final = re.compile(r"<!-- generated: ([\w.]+) -->")


def messages_table(kind: str) -> str:
    """All messages of a kind."""
    found = [message for message in find_messages() if message.kind == kind]
    has_key = any(message.key for message in found)
    header = ("setting", "message", "to fix") if has_key else ("message", "to fix")
    lines = [header, ("---",) * len(header), *(_cells(m, has_key=has_key) for m in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


GENERATORS: Final[Mapping[str, Callable[[], str]]] = MappingProxyType(
    {
        "arguments": arguments_page,
        "refused": refused_table,
        "accelerator": partial(status_table, "train.accelerator"),
        "checkpoint": partial(status_table, "train.checkpoint"),
        **{f"messages.{k}": partial(messages_table, k) for k in (SETTINGS, DATA)},
        **{f"messages.{k}": partial(messages_table, k) for k in (CHECKPOINTS, TRAINING)},
    }
)


def fill(text: str) -> str:
    """A page's text with every place filled.

    Raises:
        KeyError: A place names no generator.
    """
    return PLACE.sub(lambda match: GENERATORS[match[1]](), text)


def _cells(message: Message, *, has_key: bool) -> tuple[str, ...]:
    key = (_code(message.key),) if has_key else ()
    return (*key, _code(message.problem), message.fix.replace("|", "\\|").replace("<", "\\<"))


def _code(text: str) -> str:
    """Text as it stands, in a cell of a table."""
    if not text:
        return ""
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{text}{ticks}".replace("|", "\\|")
