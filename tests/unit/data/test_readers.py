"""Every format gives the same records; a damaged file or row says where."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from omnilit.data import csv_rows, json_array
from omnilit.data.files import DataFile, fingerprint, format_of
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
        monkeypatch.setattr(json_array, "CHUNK", chunk)
        assert fields(file) == RECORDS
    (tmp_path / "numbers.json").write_text("\n [1, 23, -4.5e-6,true]\n")
    numbers = DataFile(str(tmp_path / "numbers.json"), "json")
    for chunk in range(1, 9):
        monkeypatch.setattr(json_array, "CHUNK", chunk)
        assert [raw.data for raw in read_rows(numbers)] == [b"1", b"23", b"-4.5e-6", b"true"]


def test_an_array_on_one_line_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "x" * 400}] * 2_000))  # 0.8 MB
    monkeypatch.setattr(json_array, "CHUNK", 1 << 13)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(DataFile(str(file), "json"))) == 2_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_an_array_costs_little_more_than_its_parsing():
    text = json.dumps([{"n": 1}] * 60_000)
    begin = time.process_time()
    lines = [json.loads(line) for line in text[1:-1].replace("}, ", "}\n").splitlines()]
    parsed = time.process_time()
    assert sum(1 for _ in json_array.read_elements(io.StringIO(text), "f")) == len(lines)
    # Copying what is left of a piece for each element takes ten times as long.
    assert time.process_time() - parsed < 5 * (parsed - begin)


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


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ('[{"text": "x"}, {"text": ]', 2, "element 2 of the array is not JSON"),
        ('[{"text": "x"}, {"text" 5}' + " " * 9999, 2, "element 2 of the array is not JSON"),
        ('[{"text": "x"}, {"text": "y', 2, "element 2 of the array is not JSON"),
        ('[{"text": "x"}', 2, "the array has no end"),
        ('[{"text": "x"}, ', 2, "the array has no end"),
        ("[", 1, "the array has no end"),
        ("[1][2]", 1, "something comes behind the end of the array"),
        ('[{"text": "x"}{"text": "y"}' + " " * 99, 1, "no comma stands behind element 1"),
        ("[1, " + "[" * 100_000, 2, "element 2 of the array is not JSON"),
        ("[" + "9" * 5000 + "]", 1, "element 1 of the array is not JSON"),
    ],
)  # fmt: skip
def test_an_array_that_is_damaged_says_at_which_element(
    tmp_path: Path, text: str, row: int, message: str
):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(DataFile(str(file), "json")))
    assert (caught.value.file, caught.value.row) == (str(file), row)


def test_a_wrong_element_is_told_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(json_array, "CHUNK", 64)
    text = io.StringIO('[{"text" 5}, ' + '{"text": "x"},' * 100)
    with pytest.raises(DataError, match="element 1 of the array is not JSON"):
        list(json_array.read_elements(text, "f"))
    assert text.tell() == 64


def read_csv(file: Path, data: bytes) -> list[Any]:
    """The fields of each row, or what is wrong with it."""
    file.write_bytes(data)
    found: list[Any] = []
    for raw in read_rows(DataFile(str(file), "csv")):
        try:
            found.append(dict(parse_row(raw, file=str(file), source="s").fields))
        except DataError as error:
            found.append((error.row, error.problem))
    return found


def test_bytes_of_a_csv_file_that_are_no_text_spoil_their_row_only(tmp_path: Path):
    assert read_csv(tmp_path / "a.csv", b"text\nfine\ncaf\xe9\nfine too\n") == [
        {"text": "fine"},
        (3, "character 4 of the field 'text' is not UTF-8 (byte 0xe9)"),
        {"text": "fine too"},
    ]


def test_a_csv_row_that_would_lose_something_is_no_record(tmp_path: Path):
    assert read_csv(tmp_path / "a.csv", b'a,b\n1,2\nhello, world,3\n\n"x"y,1\n4\n') == [
        {"a": "1", "b": "2"},
        (3, "the row has 3 fields, but the first line names 2"),
        (5, "the row is not CSV (',' expected after '\"')"),
        {"a": "4", "b": None},
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text,n,text\na,b,c\n", r":1: the columns 'text' come more than once"),
        (b"caf\xe9\na\n", r":1: byte 0xe9 of a column's name is not UTF-8"),
        (b'text\n"open\nand\nso on\n', r":4: the row is not CSV \(unexpected end of data\)"),
    ],
)
def test_a_csv_file_whose_rows_cannot_be_told_apart_is_refused(
    tmp_path: Path, data: bytes, message: str
):
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "a.csv", data)


def test_a_csv_field_may_be_long_and_the_limit_of_others_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit = csv.field_size_limit()
    data = b'text\n"' + b"x" * 200_000 + b'"\ny\n'
    assert [len(row["text"]) for row in read_csv(tmp_path / "a.csv", data)] == [200_000, 1]
    monkeypatch.setattr(csv_rows, "MAX_FIELD", 1000)
    too_long, good = read_csv(tmp_path / "a.csv", data)
    assert too_long == (2, "the row is not CSV (field larger than field limit (1000))")
    assert good == {"text": "y"}
    assert csv.field_size_limit() == limit


def test_a_gzip_file_with_other_bytes_in_it_is_named(tmp_path: Path):
    packed = gzip.compress(b"".join(b'{"n": %d}\n' % (i * i) for i in range(2000)))
    for place in range(20, len(packed) - 20, len(packed) // 40):
        changed = bytearray(packed)
        for i in range(8):
            changed[place + i] ^= 0x5A
        (tmp_path / "a.jsonl.gz").write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: the file cannot be read"):
            list(read_rows(DataFile(str(tmp_path / "a.jsonl.gz"), "jsonl")))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bytes_of_a_table_that_are_no_text_spoil_their_row_only(tmp_path: Path, name: str):
    words = pa.array([b"a", b"b", b"caf\xe9", b"d", b"e"]).cast(pa.string(), safe=False)
    table = pa.table({"text": words})
    file = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    data = DataFile(str(file), name[2:])
    found = [raw.data for raw in read_rows(data, start=1)]
    assert [row for row in found if not isinstance(row, DataError)] == [
        {"text": "b"}, {"text": "d"}, {"text": "e"}
    ]  # fmt: skip
    (bad,) = [row for row in found if isinstance(row, DataError)]
    assert str(bad).startswith(f"{file}:3: a text of the row is not UTF-8")


def test_a_reader_of_the_users_own_that_is_careless_is_told_with_file_and_row():
    file = DataFile("4", "custom:tests.helpers.readers:Careless")
    rows = read_rows(file)
    assert next(rows).data == {"text": "4"}
    with pytest.raises(DataError, match=r"^4:2: the reader gave a tuple, not the fields"):
        parse_row(next(rows), file="4", source="s")
    assert next(rows) == (3, {"text": "2"})
    with pytest.raises(
        DataError,
        match=r"^4:4: the reader raised LookupError \(nothing there\) at readers\.py:\d+\. "
        r"To fix: mend tests\.helpers\.readers:Careless",
    ):
        next(rows)
    with pytest.raises(DataError, match=r"^x: the reader raised ValueError"):
        list(read_rows(DataFile("x", file.format)))
    with pytest.raises(DataError, match=r"^0: the reader raised ZeroDivisionError"):
        fingerprint(DataFile("0", file.format))
