"""The rows of a data file, one after another, and the record that each of them is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, Final, NamedTuple, Protocol

from omnilit.data.files import (
    CUSTOM,
    DATASETS,
    STREAM,
    DataFile,
    open_dataset,
    open_reader,
    unreadable,
)
from omnilit.errors import DataError
from omnilit.types import Origin, Record

ROWS_AT_ONCE: Final = 1024  # of a table
CHUNK: Final = 1 << 20  # characters of a JSON array that are read at a time


class RawRow(NamedTuple):
    """A row as it was read; cheap to send to another process.

    Args:
        row: 1-based line or row of the file.
        data: The bytes of its JSON, or its fields.
    """

    row: int
    data: bytes | Mapping[str, Any]


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
        reader = open_reader(file)
        return (RawRow(start + i, row) for i, row in enumerate(reader.rows(start), start=1))
    if file.format == DATASETS:
        return _read_dataset(file, start)
    if file.format == STREAM:
        rows = open_dataset(file).skip(start)
        return (RawRow(start + i, row) for i, row in enumerate(rows, start=1))
    return _guard(file, READERS[file.format](file, start))


def parse_row(raw: RawRow, *, file: str, source: str) -> Record:
    """The record of a row.

    Args:
        raw: From `read_rows`.
        file: Its path, for the record's origin.
        source: Name of the data source, likewise.

    Raises:
        DataError: The row is not UTF-8, not JSON, or not an object; names file and line.
    """
    data = raw.data
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
    import gzip

    import pyarrow as pa
    import zstandard

    damages = (OSError, EOFError, gzip.BadGzipFile, zstandard.ZstdError, pa.ArrowInvalid)
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
        first = next((line for line in data if line.strip()), b"")
    if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from _read_jsonl(file, start)
        return
    with _open(file) as data:
        text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape")
        elements = enumerate(_elements(text, file.path), start=1)
        for row, element in islice(elements, start, None):
            yield RawRow(row, element.encode("utf-8", "surrogateescape"))


def _elements(text: IO[str], path: str) -> Iterator[str]:
    """The source of each element of a JSON array, read piece by piece."""
    decoder = json.JSONDecoder()
    held, is_over = text.read(CHUNK).lstrip()[1:], False
    number = 0
    while True:
        held = held.lstrip().removeprefix(",").lstrip()
        if held.startswith("]"):
            return
        try:
            _, end = decoder.raw_decode(held)
            is_whole = end < len(held)  # a number may go on in the next piece
        except ValueError as error:
            if is_over:
                raise DataError(
                    problem=f"element {number + 1} of the array is not JSON ({error})",
                    fix="mend the file; nothing behind that place can be read",
                    file=path,
                    row=number + 1,
                ) from error
            is_whole, end = False, 0
        if is_whole:
            number += 1
            yield held[:end]
            held = held[end:]
            continue
        more = text.read(max(CHUNK, len(held)))
        held, is_over = held + more, not more


def _read_csv(file: DataFile, start: int) -> Iterator[RawRow]:
    """Rows by the names of the first line; every value is a text."""
    with _open(file) as data:
        text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(text, restkey=None)
        for fields in islice(rows, start, None):
            named = {name: value for name, value in fields.items() if name is not None}
            yield RawRow(rows.line_num, named)


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
        yield from _rows_of(batches, first=first, start=start)


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
        yield from _rows_of(batches, first=0, start=start)


def _rows_of(batches: Iterable[Any], *, first: int, start: int) -> Iterator[RawRow]:
    """The rows of record batches, of which the first is row `first` of the file."""
    for batch in batches:
        size = batch.num_rows
        if first + size > start:
            skipped = max(start - first, 0)
            for begin in range(skipped, size, ROWS_AT_ONCE):
                for i, fields in enumerate(batch.slice(begin, ROWS_AT_ONCE).to_pylist()):
                    yield RawRow(first + begin + i + 1, fields)
        first += size


def _read_dataset(file: DataFile, start: int) -> Iterator[RawRow]:
    data = open_dataset(file)
    for begin in range(start, len(data), ROWS_AT_ONCE):
        columns = data[begin : begin + ROWS_AT_ONCE]
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            yield RawRow(begin + i + 1, dict(zip(columns, values, strict=True)))


READERS: Final = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
