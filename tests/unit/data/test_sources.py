"""Files and the records in them, and what is said of bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from omnilit.data.sources import list_files, read_jsonl
from omnilit.errors import ConfigError, DataError
from omnilit.types import Origin

KEY = "data.train_path"


def test_a_folder_gives_its_jsonl_files_sorted_and_nothing_else(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "_SUCCESS", "notes.txt", "c.jsonl.tmp"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "d.jsonl").mkdir()
    assert [f.name for f in list_files(str(tmp_path), key=KEY)] == ["a.jsonl", "b.jsonl"]


def test_commas_separate_files_and_folders_in_the_order_given(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for name in ("z.jsonl", "folder/a.jsonl"):
        (tmp_path / name).write_text("{}\n")
    found = list_files(f"{tmp_path}/z.jsonl, {tmp_path}/folder", key=KEY)
    assert [f.name for f in found] == ["z.jsonl", "a.jsonl"]


def test_all_bad_items_of_a_path_are_reported_together(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a,b\n")
    path = f"{tmp_path}/gone.jsonl,{tmp_path}/empty,{tmp_path}/x.csv"
    with pytest.raises(ConfigError) as caught:
        list_files(path, key=KEY)
    assert [p.key for p in caught.value.problems] == [KEY] * 3
    gone, empty, ending = map(str, caught.value.problems)
    assert "gone.jsonl does not exist" in gone
    assert "empty holds no .jsonl file" in empty
    assert "x.csv does not end in .jsonl" in ending


def test_an_empty_path_and_a_file_named_twice_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="names no file"):
        list_files(" , ", key=KEY)
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl more than once"):
        list_files(f"{tmp_path}/a.jsonl,{tmp_path}", key=KEY)


def test_records_know_their_line_blank_lines_counted(write_jsonl: Callable[..., Path]):
    file = write_jsonl([{"a": 1}, "", "   ", {"a": 2}])
    records = list(read_jsonl(file, source="s"))
    assert [(r.fields["a"], r.origin) for r in records] == [
        (1, Origin("s", str(file), 1)),
        (2, Origin("s", str(file), 4)),
    ]


def test_a_byte_order_mark_windows_line_ends_and_a_missing_last_one_are_read(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
    assert [r.fields["a"] for r in read_jsonl(file, source="s")] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b"[1, 2]", "the line holds a JSON list, not an object"),
        (b"null", "the line holds a JSON NoneType, not an object"),
        (b'{"a": "\xff"}', "byte 8 of the line is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"a": 0}\n' + line + b"\n")
    records = read_jsonl(file, source="s")
    next(records)
    with pytest.raises(DataError, match=message) as caught:
        next(records)
    assert str(caught.value).startswith(f"{file}:2: ")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.jsonl: the file cannot be read \(No such file"):
        next(read_jsonl(tmp_path / "gone.jsonl", source="s"))
