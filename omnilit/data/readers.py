"""The rows of a data file, one after another, and the record that each of them is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, Final, NamedTuple, Protocol

from omnilit.data.csv_rows import read_fields
from omnilit.data.files import (
    CUSTOM,
    DATASETS,
    STREAM,
    DataFile,
    ask_reader,
    failed_reader,
    open_dataset,
    unreadable,
)
from omnilit.data.json_array import is_array, read_elements
from omnilit.errors import DataError, OmniError
from omnilit.types import Origin, Record

ROWS_AT_ONCE: Final = 1024  # of a table
CHUNK: Final = 1 << 20  # bytes of a compressed file that are read at a time


class RawRow(NamedTuple):
    """A row as it was read; cheap to send to another process.

    Args:
        row: 1-based line or row of the file.
        data: The bytes of its JSON, or its fields, or why there are none.
    """

    row: int
    data: bytes | Mapping[str, Any] | DataError


class RowReader(Protocol):
    """What a class must offer to be named as `data.datasets_type: package.module:Class`."""

    def __init__(self, path: str) -> None:
        """Take what `data.train_path` says."""
        ...

    def fingerprint(self) -> str:
        """Another text whenever the rows are others."""
        ...

    def rows(self, start: int) -> Iterator[Mapping[str, Any]]:
        """The fields of each row from row `start` on, counted from 0."""
        ...


def read_rows(file: DataFile, *, start: int = 0) -> Iterator[RawRow]:
    """The rows of a file; blank lines are none.

    Memory does not grow with the file.

    Args:
        file: Any format.
        start: Rows to pass over, without parsing them where that is possible.

    Raises:
        DataError: The file cannot be opened, or is damaged where it is read.
    """
    if file.format.startswith(CUSTOM):
        return _read_custom(file, start)
    return _guard(file, READERS[file.format](file, start))


def parse_row(raw: RawRow, *, file: str, source: str) -> Record:
    """The record of a row.

    Args:
        raw: From `read_rows`.
        file: Its path, for the record's origin.
        source: Name of the data source, likewise.

    Raises:
        DataError: The row is not UTF-8, not JSON, or not an object, or its reader found it
            wrong; names file and line.
    """
    data = raw.data
    if isinstance(data, DataError):
        raise data
    if isinstance(data, bytes):
        data = _parse_json(data, file, raw.row)
    return Record(data, Origin(source, file, raw.row))


def _parse_json(line: bytes, file: str, row: int) -> dict[str, Any]:
    try:
        # A byte order mark may stand in front of the first line.
        fields = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error, file, row) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            problem=f"the line is not JSON ({error})",
            fix="write one whole JSON object a line",
            file=file,
            row=row,
        ) from error
    if not isinstance(fields, dict):
        raise DataError(
            problem=f"the line holds a JSON {type(fields).__name__}, not an object",
            fix='write each record as an object, such as {"messages": [...]}',
            file=file,
            row=row,
        )
    return fields


def not_utf8(error: UnicodeDecodeError, file: str, row: int) -> DataError:
    """The error for bytes that are no text."""
    return DataError(
        problem=f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})",
        fix="save the file in UTF-8",
        file=file,
        row=row,
    )


def _guard(file: DataFile, rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """The rows, with what the libraries below raise told as our own error."""
    import zlib

    import pyarrow as pa
    import zstandard

    damages = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)
    try:
        yield from rows
    except damages as error:
        raise unreadable(file.path, error) from error


@contextmanager
def _open(file: DataFile) -> Iterator[IO[bytes]]:
    import fsspec

    if file.is_local and not file.path.endswith((".gz", ".zst")):
        with open(file.path, "rb") as data:  # noqa: PTH123 - the cheapest way
            yield data
        return
    compression = "gzip" if file.path.endswith(".gz") else None
    opened: Any = fsspec.open(file.path, "rb", compression=compression)
    with opened as data:
        is_zstd = file.path.endswith(".zst")
        yield io.BufferedReader(_ZstdFile(data)) if is_zstd else data


@contextmanager
def _open_text(file: DataFile, *, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file; bytes that are none come as surrogates, for the row to be found."""
    with _open(file) as data:
        yield io.TextIOWrapper(
            data, encoding="utf-8-sig", errors="surrogateescape", newline=newline
        )


class _ZstdFile(io.RawIOBase):
    """What a zstd file holds; unlike zstandard's own reader it notices an end that is missing.

    Args:
        data: The compressed file.
    """

    def __init__(self, data: IO[bytes]) -> None:
        import zstandard

        self._data = data
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._held = b""
        self._is_inside = False  # of a frame

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`; 0 at the end.

        Raises:
            EOFError: The file ends within a frame.
        """
        while not self._held:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_inside = self._decompressor.decompressobj(), False
            packed = packed or self._data.read(CHUNK)
            if not packed:
                if self._is_inside:
                    raise EOFError("the file ends too early")
                return 0
            self._is_inside = True
            self._held = self._frame.decompress(packed)
            self._is_inside = not self._frame.eof
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size


def _read_jsonl(file: DataFile, start: int) -> Iterator[RawRow]:
    with _open(file) as data:
        rows = ((i, line) for i, line in enumerate(data, start=1) if line.strip())
        for row, line in islice(rows, start, None):
            yield RawRow(row, line)


def _read_json(file: DataFile, start: int) -> Iterator[RawRow]:
    """An array of objects, or one object a line."""
    with _open(file) as data:
        is_lines = not is_array(data)
    if is_lines:
        yield from _read_jsonl(file, start)
        return
    with _open_text(file) as text:
        elements = enumerate(read_elements(text, file.path), start=1)
        for row, element in islice(elements, start, None):
            yield RawRow(row, element.encode("utf-8", "surrogateescape"))


def _read_csv(file: DataFile, start: int) -> Iterator[RawRow]:
    """Rows by the names of the first line; every value is a text."""
    with _open_text(file, newline="") as text:
        for row, fields in islice(read_fields(text, file.path), start, None):
            yield RawRow(row, fields)


def _read_parquet(file: DataFile, start: int) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    with _open(file) as data:
        table = pq.ParquetFile(data)
        first, groups = 0, []
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if groups or first + size > start:
                groups.append(group)
            else:
                first += size
        batches = table.iter_batches(ROWS_AT_ONCE, row_groups=groups)
        yield from _rows_of(batches, file.path, first=first, start=start)


def _read_arrow(file: DataFile, start: int) -> Iterator[RawRow]:
    import pyarrow as pa

    with _open(file) as data:
        is_file = data.read(6) == b"ARROW1"
        data.seek(0)
        if is_file:
            reader = pa.ipc.open_file(data)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(data))
        yield from _rows_of(batches, file.path, first=0, start=start)


def _rows_of(batches: Iterable[Any], path: str, *, first: int, start: int) -> Iterator[RawRow]:
    """The rows of record batches, of which the first is row `first` of the file."""
    for batch in batches:
        size = batch.num_rows
        if first + size > start:
            skipped = max(start - first, 0)
            for begin in range(skipped, size, ROWS_AT_ONCE):
                row = first + begin + 1
                fields = _fields_of(batch.slice(begin, ROWS_AT_ONCE), path, row)
                yield from (RawRow(row + i, found) for i, found in enumerate(fields))
        first += size


def _fields_of(batch: Any, path: str, row: int) -> list[Mapping[str, Any] | DataError]:
    """The fields of each row of a batch that begins at `row`."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [
                DataError(
                    problem=f"a text of the row is not UTF-8 ({error.reason} at its byte "
                    f"{error.start + 1})",
                    fix="write texts in UTF-8",
                    file=path,
                    row=row,
                )
            ]
    half = batch.num_rows // 2
    parts = (
        _fields_of(batch.slice(0, half), path, row),
        _fields_of(batch.slice(half), path, row + half),
    )
    return [*parts[0], *parts[1]]


def _read_dataset(file: DataFile, start: int) -> Iterator[RawRow]:
    data = open_dataset(file)
    for begin in range(start, len(data), ROWS_AT_ONCE):
        columns = data[begin : begin + ROWS_AT_ONCE]
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            yield RawRow(begin + i + 1, dict(zip(columns, values, strict=True)))


def _read_stream(file: DataFile, start: int) -> Iterator[RawRow]:
    rows = open_dataset(file).skip(start)
    return (RawRow(start + i, row) for i, row in enumerate(rows, start=1))


def _read_custom(file: DataFile, start: int) -> Iterator[RawRow]:
    """The rows of a reader of the user's own, which may raise anything."""
    rows, row = ask_reader(file, lambda reader: iter(reader.rows(start))), start
    try:
        for fields in rows:
            row += 1
            is_good = isinstance(fields, Mapping)
            yield RawRow(row, fields if is_good else _no_fields(fields, file, row))
    except BaseException as error:
        if isinstance(error, OmniError) or not isinstance(error, Exception):
            raise
        raise failed_reader(error, file, row + 1) from error


def _no_fields(found: object, file: DataFile, row: int) -> DataError:
    return DataError(
        problem=f"the reader gave a {type(found).__name__}, not the fields of a record by name",
        fix="yield a mapping for each row",
        file=file.path,
        row=row,
    )


READERS: Final = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    DATASETS: _read_dataset,
    STREAM: _read_stream,
}
