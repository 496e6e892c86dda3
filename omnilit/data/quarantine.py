"""Bad records: what is wrong with them, how many are too many, and where they are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from omnilit.errors import DataError

FILE: Final = "quarantine.jsonl"
MIN_RECORDS: Final = 1000  # before so many are read, a share says little


class BadRecord(NamedTuple):
    """A record that cannot be used.

    Args:
        source: Name of the data source.
        file: Where it stands.
        row: 1-based line or row.
        reason: What is wrong.
        fix: What to do.
    """

    source: str
    file: str
    row: int
    reason: str
    fix: str

    @classmethod
    def of(cls, error: DataError, *, source: str, file: str, row: int) -> BadRecord:
        """From what reading or transforming a record raised."""
        return cls(source, error.file or file, error.row or row, error.problem, error.fix)


def check_bad_fraction(
    num_bad: float, num_records: float, *, limit: float, is_final: bool = True
) -> None:
    """Stop a run that skips too much.

    Args:
        num_bad: Records skipped.
        num_records: Records read, those included.
        limit: `data.max_bad_fraction`.
        is_final: All that there is was read; else a thousand records are waited for.

    Raises:
        DataError: The share is above the limit.
    """
    if num_bad <= limit * num_records or (not is_final and num_records < MIN_RECORDS):
        return
    raise DataError(
        problem=f"{num_bad:.0f} of {num_records:.0f} records are bad, more than "
        f"data.max_bad_fraction: {limit:g}",
        fix=f"mend the data ({FILE} and omnilit data say what is wrong with each), or raise it",
    )


def append_quarantine(file: Path, records: Iterable[BadRecord]) -> int:
    """Write bad records as JSON lines, those left out that stand in the file already.

    Args:
        file: `quarantine.jsonl` of a run.
        records: What to add.

    Returns:
        How many were new.
    """
    known = {(old.source, old.file, old.row) for old in read_quarantine(file)}
    new = [r for r in dict.fromkeys(records) if (r.source, r.file, r.row) not in known]
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bad(file, new)
    return len(new)


def write_bad(file: Path, records: Iterable[BadRecord]) -> None:
    """Add bad records to a file, whatever stands in it already."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write("".join(json.dumps(record._asdict()) + "\n" for record in records))


def read_quarantine(file: Path) -> Iterator[BadRecord]:
    """The records that `append_quarantine` wrote; none where there is no file."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # a run that was killed may have left half a line
                yield BadRecord(**json.loads(line))
