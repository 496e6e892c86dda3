"""Every format gives the same records; a damaged file or row says where."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from omnilit.data import readers
from omnilit.data.files import DataFile, format_of
from omnilit.data.readers import parse_row, read_rows
from omnilit.errors import DataError

RECORDS = [{"text": f'line {i} caf\u00e9\n[{{"', "n": str(i)} for i in range(7)]


def write(file: Path) -> DataFile:
    """RECORDS in the format that the name says."""
    kind = format_of(file.name)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in RECORDS)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), file, row_group_size=3)
    elif kind == "arrow":
        table = pa.Table.from_pylist(RECORDS)
        maker = pa.ipc.new_stream if "stream" in file.name else pa.ipc.new_file
        with maker(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, ["text", "n"])
            writer.writeheader()
            writer.writerows(RECORDS)
    else:
        text = json.dumps(RECORDS, indent=1) if "array" in file.name else lines
        file.write_text(text, encoding="utf-8")
    raw = file.read_bytes()
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(raw))
    if file.suffix == ".zst":
        file.write_bytes(zstandard.compress(raw))
    assert kind is not None
    return DataFile(str(file), kind)


def fields(file: DataFile, *, start: int = 0) -> list[Any]:
    return [
        dict(parse_row(raw, file=file.path, source="s").fields)
        for raw in read_rows(file, start=start)
    ]


NAMES = (
    *("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.json", "array.json", "array.json.gz"),
    *("a.csv", "a.csv.zst", "a.parquet", "a.arrow", "stream.arrow"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_records_from_any_row_on(tmp_path: Path, name: str):
    file = write(tmp_path / name)
    assert fields(file) == RECORDS
    for start in (1, 3, 4, 6, 7, 9):
        assert fields(file, start=start) == RECORDS[start:]


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "a.arrow"])
def test_rows_are_counted_from_one_as_an_editor_counts_lines(tmp_path: Path, name: str):
    rows = [raw.row for raw in read_rows(write(tmp_path / name))]
    assert rows == ([1, 3, 5, 7, 9, 11, 13] if name == "a.jsonl" else [1, 2, 3, 4, 5, 6, 7])


def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "array.json")
    for chunk in (1, 7, 64):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        assert fields(file) == RECORDS
    (tmp_path / "numbers.json").write_text("[1, 23]")
    numbers = DataFile(str(tmp_path / "numbers.json"), "json")
    monkeypatch.setattr(readers, "CHUNK", 5)
    assert [raw.data for raw in read_rows(numbers)] == [b"1", b"23"]


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"text": "x"}\n')
    assert fields(DataFile(str(file), "jsonl")) == [{"text": "x"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "the line is not JSON"),
        (b"[1, 2]", "the line holds a JSON list, not an object"),
        (b'{"text": "\xff"}', "byte 11 of the line is not UTF-8"),
        (b"[" * 100_000, "the line is not JSON"),
    ],
)
def test_a_bad_row_says_file_line_and_reason(tmp_path: Path, line: bytes, message: str):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "x"}\n' + line + b"\n")
    rows = list(read_rows(DataFile(str(file), "jsonl")))
    with pytest.raises(DataError, match=message) as caught:
        parse_row(rows[1], file=str(file), source="s")
    assert (caught.value.file, caught.value.row) == (str(file), 2)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_was_cut_off_is_named_with_the_reason(tmp_path: Path, name: str):
    file = write(tmp_path / name)
    path = Path(file.path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"{name}: the file cannot be read"):
        list(read_rows(file))


def test_an_array_that_is_damaged_says_at_which_element(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text('[{"text": "x"}, {"text": ]')
    with pytest.raises(DataError, match=r"a\.json:2: element 2 of the array is not JSON"):
        list(read_rows(DataFile(str(file), "json")))


def test_bytes_of_a_csv_file_that_are_no_text_spoil_their_row_only(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"text\nfine\n\xff\nfine too\n")
    found = fields(DataFile(str(file), "csv"))
    assert [row["text"] for row in found] == ["fine", "\udcff", "fine too"]
