"""Where records come from: which files a path means, and what stands in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from omnilit.errors import ConfigError, DataError, Problem
from omnilit.types import Origin, Record

ENDING = ".jsonl"


def list_files(path: str, *, key: str) -> list[Path]:
    """The data files that `path` names, in a fixed order.

    Args:
        path: Files and folders, separated by commas. Of a folder the files ending in `.jsonl`
            are taken, sorted by name; what else lies there is not data.
        key: The YAML path that `path` was given under, for messages.

    Raises:
        ConfigError: Lists every item that does not exist, has no data or has another ending.
    """
    items = [Path(item.strip()) for item in path.split(",") if item.strip()]
    if not items:
        raise ConfigError(key=key, problem="names no file", fix="name a .jsonl file or a folder")
    files: list[Path] = []
    problems: list[Problem] = []
    for item in items:
        found = _list_item(item, key=key)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            files.extend(found)
    if problems:
        raise ConfigError.of(problems)
    if repeated := sorted({str(file) for file in files if files.count(file) > 1}):
        raise ConfigError(
            key=key,
            problem=f"names {', '.join(repeated)} more than once",
            fix="name each file once",
        )
    return files


def read_jsonl(file: Path, *, source: str) -> Iterator[Record]:
    """The records of a file, one JSON object a line; blank lines are passed over.

    Args:
        file: A text file in UTF-8.
        source: Name of the data source, kept in each record's origin.

    Raises:
        DataError: A line is not UTF-8, not JSON, or not an object; names file and line.
    """
    with open_data(file) as lines:
        for row, line in enumerate(lines, start=1):
            if line.strip():
                yield Record(_parse(line, file, row), Origin(source, str(file), row))


def open_data(file: Path) -> BufferedReader:
    """Open a data file for reading bytes.

    Raises:
        DataError: It cannot be opened.
    """
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(
            problem=f"the file cannot be read ({error.strerror})",
            fix="check that it exists and that you may read it",
            file=str(file),
        ) from error


def _list_item(item: Path, *, key: str) -> list[Path] | Problem:
    if item.is_dir():
        found = sorted(f for f in item.iterdir() if f.is_file() and f.name.endswith(ENDING))
        if found:
            return found
        return Problem(key, f"the folder {item} holds no {ENDING} file", "put one there")
    if not item.exists():
        return Problem(key, f"{item} does not exist", "correct the path, or create the file")
    if not item.name.endswith(ENDING):
        return Problem(
            key, f"{item} does not end in {ENDING}", "convert it to one JSON object a line"
        )
    return [item]


def _parse(line: bytes, file: Path, row: int) -> dict[str, object]:
    try:
        # A byte order mark may stand in front of the first line.
        fields = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            problem=f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})",
            fix="save the file in UTF-8",
            file=str(file),
            row=row,
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            problem=f"the line is not JSON ({error})",
            fix="write one whole JSON object a line",
            file=str(file),
            row=row,
        ) from error
    if not isinstance(fields, dict):
        raise DataError(
            problem=f"the line holds a JSON {type(fields).__name__}, not an object",
            fix='write each record as an object, such as {"messages": [...]}',
            file=str(file),
            row=row,
        )
    return fields
