"""What a run writes down of the records that it skips."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omnilit.data import quarantine
from omnilit.data.quarantine import BadRecord, Quarantine, read_quarantine
from omnilit.errors import DataError


def bad(row: int) -> BadRecord:
    return BadRecord("s", "f", row, "odd", "mend it")


def test_bad_records_are_written_once(tmp_path: Path):
    file = tmp_path / "run" / "quarantine.jsonl"
    one = Quarantine(file)
    assert one.add([bad(1), bad(1)]) == 1
    assert one.add([bad(1), bad(2)]) == 1
    resumed = Quarantine(file)
    assert resumed.add([bad(2), bad(3)]) == 1
    assert list(read_quarantine(file)) == [bad(1), bad(2), bad(3)]
    assert list(read_quarantine(tmp_path / "none")) == []


@pytest.mark.parametrize("half", ['{"source": "s", "file": "f", "ro', "\x00\x00\x00", '{"a": 1}\n'])
def test_what_a_killed_run_left_half_written_spoils_no_other_line(tmp_path: Path, half: str):
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file).add([bad(1)])
    with file.open("a") as lines:
        lines.write(half)
    for row in (2, 3):
        assert Quarantine(file).add([bad(1), bad(row)]) == 1
    assert list(read_quarantine(file)) == [bad(1), bad(2), bad(3)]


def test_a_line_that_lacks_its_end_only_is_known(tmp_path: Path):
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file).add([bad(1)])
    file.write_text(file.read_text().rstrip())
    assert Quarantine(file).add([bad(1), bad(2)]) == 1
    assert list(read_quarantine(file)) == [bad(1), bad(2)]


def test_the_file_is_read_once_however_often_something_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads: list[Path] = []

    def read(file: Path):
        reads.append(file)
        return read_quarantine(file)

    monkeypatch.setattr(quarantine, "read_quarantine", read)
    one = Quarantine(tmp_path / "quarantine.jsonl")
    assert sum(one.add([bad(row), bad(row + 1)]) for row in range(50)) == 51
    assert len(reads) == 1


def add_many(file: Path, first: int) -> int:
    writer = Quarantine(file)
    rows = range(first, first + 100)
    return sum(writer.add([bad(row)._replace(reason="odd " * 3000)]) for row in rows)


def test_several_writers_add_whole_lines(tmp_path: Path):
    file = tmp_path / "quarantine.jsonl"
    with ThreadPoolExecutor(3) as pool:  # each opens the file anew, as processes do
        for added in pool.map(add_many, [file] * 3, (0, 100, 200)):
            assert added == 100
    assert sum(bool(line) for line in file.read_text().splitlines()) == 300
    assert {one.row for one in read_quarantine(file)} == set(range(300))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "run").write_text("a file, no folder")
    with pytest.raises(DataError, match=r"quarantine\.jsonl: bad records cannot be written"):
        Quarantine(tmp_path / "run" / "quarantine.jsonl").add([bad(1)])
