"""How records are refused: with their file and line."""

from __future__ import annotations

from omnilit.errors import DataError
from omnilit.types import Record


def refuse(record: Record, problem: str, fix: str) -> DataError:
    """An error that names the record's file and line."""
    return DataError(problem=problem, fix=fix, file=record.origin.file, row=record.origin.row)


def kind_of(value: object) -> str:
    """The kind of a value, for messages."""
    return "null" if value is None else f"a {type(value).__name__}"
