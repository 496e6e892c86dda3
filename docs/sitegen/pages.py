"""What stands in place of `<!-- generated: NAME -->` on a page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from sitegen.arguments import arguments_page, refused_table, settings_below
from sitegen.messages import CHECKPOINTS, DATA, SETTINGS, TRAINING, Message, find_messages

NO_ADVICE: Final = "What to do depends on what the message names."
PLACE: Final = re.compile(r"<!-- generated: ([\w.]+) -->")


def messages_list(kind: str) -> str:
    """All messages of a kind, each with its advice; those of a known setting first."""
    found = [message for message in find_messages() if message.kind == kind]
    return "".join(_entry(m) for m in sorted(found, key=lambda m: not m.key))


GENERATORS: Final[Mapping[str, Callable[[], str]]] = MappingProxyType(
    {
        "arguments": arguments_page,
        "refused": refused_table,
        "accelerator": partial(settings_below, "train.accelerator"),
        "checkpoint": partial(settings_below, "train.checkpoint"),
        **{f"messages.{k}": partial(messages_list, k) for k in (SETTINGS, DATA)},
        **{f"messages.{k}": partial(messages_list, k) for k in (CHECKPOINTS, TRAINING)},
    }
)


def fill(text: str) -> str:
    """A page's text with every place filled.

    Raises:
        KeyError: A place names no generator.
    """
    return PLACE.sub(lambda match: GENERATORS[match[1]](), text)


def _entry(message: Message) -> str:
    """One message, as an item of a list of definitions."""
    said = f"{message.key}: {message.problem}" if message.key else message.problem
    ticks = "``" if "`" in said else "`"
    fix = f"To fix: {html.escape(message.fix, quote=False)}." if message.fix else NO_ADVICE
    return f"{ticks}{said}{ticks}\n: {fix}\n\n"
