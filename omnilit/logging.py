"""One logger for the package, and plain text tables of what was chosen."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence


def get_logger(name: str) -> logging.Logger:
    """The logger of module `name`; `show_on_rank_zero` decides what is printed."""
    return logging.getLogger(name)


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank as its launcher says, before a process group stands."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(environment[name]) for name in names if name in environment), 0)


def show_on_rank_zero(rank: int) -> None:
    """Print the package's log to standard error: INFO on rank 0, warnings on the others."""
    logger = logging.getLogger("omnilit")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def format_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    width: int | None = None,
) -> str:
    """A table in plain text: a title line, then columns padded to their widest cell.

    Args:
        title: The first line.
        header: Names of the columns.
        rows: Of as many cells each.
        width: Columns of the terminal, into which the last column of the table is wrapped.
    """
    cells = [tuple(header), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if width is not None:
        room = max(width - sum(w + 2 for w in widths[:-1]) - 2, 20)
        cells = [row for full in cells for row in _wrap_last(full, room)]
        widths[-1] = min(widths[-1], room)
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _wrap_last(row: Sequence[str], room: int) -> list[tuple[str, ...]]:
    """The row, and below it what of its last cell finds no room."""
    first, *more = textwrap.wrap(row[-1], room) or [""]
    below = [(*("" for _ in row[:-1]), line) for line in more]
    return [(*row[:-1], first), *below]
