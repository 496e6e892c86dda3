"""The rows of a CSV file, by the names in its first line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

from omnilit.errors import DataError

MAX_FIELD: Final = 1 << 26  # characters; a quote that is left open ends here at the latest
BYTES: Final = 0xDC00  # where surrogateescape puts bytes that are no text


def read_fields(
    text: IO[str], path: str
) -> Iterator[tuple[int, Mapping[str, str | None] | DataError]]:
    """The line where each row ends and its fields, or why it cannot be used; blank ones are none.

    A row may have fewer fields than names: the others are None.

    Args:
        text: From the beginning, with bytes that are no text as surrogates.
        path: Of its file, for messages.

    Raises:
        DataError: The names cannot be used, or it cannot be known where a row ends.
    """
    reader = csv.reader(text, strict=True)
    names = _next_row(reader, path)
    if isinstance(names, DataError):
        raise names
    if names is None:
        return
    if problem := _find_name_problem(names):
        fix = "give each column a name of its own"
        raise DataError(problem=problem, fix=fix, file=path, row=1)
    while (row := _next_row(reader, path)) is not None:
        found = row if isinstance(row, DataError) else _name(row, names, path, reader.line_num)
        yield reader.line_num, found


def _next_row(reader: Any, path: str) -> list[str] | DataError | None:
    """The next row that is not blank; None behind the last one."""
    begin = reader.line_num
    limit = csv.field_size_limit(MAX_FIELD)  # of the whole process, so it is given back
    try:
        while (row := next(reader, None)) == []:
            begin = reader.line_num
    except csv.Error as error:
        found = DataError(
            problem=f"the row is not CSV ({error})",
            fix='close every quote, and write "" for a quote within quotes',
            file=path,
            row=reader.line_num,
        )
        if reader.line_num > begin + 1:  # it may have swallowed others
            raise found from error
        return found
    finally:
        csv.field_size_limit(limit)
    return row


def _find_name_problem(names: Sequence[str]) -> str:
    for name in names:
        if (place := _find_byte(name)) is not None:
            return f"byte 0x{ord(name[place]) - BYTES:02x} of a column's name is not UTF-8"
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        return f"the columns {', '.join(map(repr, twice))} come more than once"
    return ""


def _name(
    row: Sequence[str], names: Sequence[str], path: str, line: int
) -> Mapping[str, str | None] | DataError:
    if len(row) > len(names):
        return DataError(
            problem=f"the row has {len(row)} fields, but the first line names {len(names)}",
            fix="put a field that holds a comma in double quotes",
            file=path,
            row=line,
        )
    for name, value in zip(names, row, strict=False):
        if (place := _find_byte(value)) is not None:
            return DataError(
                problem=f"character {place + 1} of the field {name!r} is not UTF-8 "
                f"(byte 0x{ord(value[place]) - BYTES:02x})",
                fix="save the file in UTF-8",
                file=path,
                row=line,
            )
    return dict.fromkeys(names) | dict(zip(names, row, strict=False))


def _find_byte(text: str) -> int | None:
    """Where the first byte stands that is no text."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
