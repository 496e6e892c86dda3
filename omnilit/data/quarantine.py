"""Bad records: what is wrong with them, how many are too many, and where they are written."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


def _forget(records: Sequence[BadRecord]) -> None:
    """Do nothing with what was skipped."""


@dataclass(frozen=True, slots=True)
class Skipping:
    """What becomes of records that are found to be bad while training.

    Args:
        on_bad: Is given those that this rank skipped.
        max_bad_fraction: Share of them, over all ranks, that stops the run.
    """

    on_bad: Callable[[Sequence[BadRecord]], None] = _forget
    max_bad_fraction: float = 0.01


class Quarantine:
    """The bad records of a run in a file of JSON lines, each of them once.

    Several processes may add to one file. What stands in it is read before the first addition;
    what is added later by others is not looked at, since they skip records of their own.

    Args:
        file: `quarantine.jsonl` of a run; made when there is something to write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: set[tuple[str, str, int]] | None = None

    def add(self, records: Iterable[BadRecord]) -> int:
        """Write records down, those left out that are known.

        Returns:
            How many were new.

        Raises:
            DataError: The file cannot be written.
        """
        try:
            if self._known is None:
                self._known = set(map(_place, read_quarantine(self.file)))
            new = {_place(one): one for one in records if _place(one) not in self._known}
            if new:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_bad(self.file, new.values())
                self._known.update(new)
        except OSError as error:
            raise DataError(
                problem=f"bad records cannot be written down ({error.strerror})",
                fix="free space, or choose an output_dir that can be written",
                file=str(self.file),
            ) from error
        return len(new)


def write_bad(file: Path, records: Iterable[BadRecord]) -> None:
    """Add bad records to a file, as whole lines, whatever stands in it already."""
    data = "".join(json.dumps(record._asdict()) + "\n" for record in records).encode()
    if not data:
        return
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # else a half-written line of another looks torn
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # half a line of a killed run
            data = b"\n" + data
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def read_quarantine(file: Path) -> Iterator[BadRecord]:
    """The records that were written; none where there is no file.

    What a run that was killed left of a line is passed over.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield BadRecord(**json.loads(line))
            except (ValueError, TypeError):  # no JSON, or not all of the fields
                continue


def _place(record: BadRecord) -> tuple[str, str, int]:
    return record.source, record.file, record.row
