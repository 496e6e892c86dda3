"""Which data a path means, and what is said of one that means none."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import fsspec
import pytest

from omnilit.data.files import DataFile, file_size, fingerprint, list_files
from omnilit.data.readers import read_rows
from omnilit.errors import ConfigError, DataError

KEY = "data.train_path"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.parquet", "c.csv.gz", "_SUCCESS", "x.txt", "deep/d.json.zst"):
        (tmp_path / "data" / name).write_text("{}\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(files: list[DataFile]) -> list[tuple[str, str]]:
    return [(Path(file.path).name, file.format) for file in files]


def test_a_folder_gives_its_files_with_a_known_ending_in_order(here: Path):
    expected = [("a.parquet", "parquet"), ("b.jsonl", "jsonl"), ("c.csv.gz", "csv")]
    assert names(list_files("data", key=KEY)) == expected


def test_patterns_and_lists_may_mix_endings(here: Path):
    assert names(list_files("data/**/*.json*", key=KEY)) == [
        ("b.jsonl", "jsonl"),
        ("d.json.zst", "json"),
    ]
    assert names(list_files("data/b.jsonl, data/a.parquet", key=KEY)) == [
        ("b.jsonl", "jsonl"),
        ("a.parquet", "parquet"),
    ]


def test_urls_of_fsspec_are_files_folders_and_patterns(here: Path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b'{"text": "x"}\n')
    memory.pipe("/bucket/readme.md", b"")
    for url in ("memory://bucket/a.jsonl", "memory://bucket", "memory://bucket/*.jsonl"):
        (file,) = list_files(url, key=KEY)
        assert [row.data for row in read_rows(file)] == [b'{"text": "x"}\n']
        assert file_size(file) == 14
        assert len(fingerprint(file)) > 8
    (file,) = list_files(f"file://{here}/data/b.jsonl", key=KEY)
    assert file.format == "jsonl"


def test_a_saved_data_set_is_read_with_its_splits(here: Path):
    train = datasets.Dataset.from_list([{"text": str(i)} for i in range(5)])
    train.save_to_disk("saved")
    datasets.DatasetDict({"train": train, "dev": train.select([3])}).save_to_disk("splits")
    for path, expected in (("saved", 5), ("splits", 5), ("splits#dev", 1)):
        (file,) = list_files(path, key=KEY)
        assert len(list(read_rows(file))) == expected
        assert fingerprint(file)
    (file,) = list_files("saved", key=KEY)
    assert [row.data for row in read_rows(file, start=3)] == [{"text": "3"}, {"text": "4"}]
    with pytest.raises(ConfigError, match=r"no such split.*splits#train, splits#dev"):
        list_files("splits#test", key=KEY)


def test_a_name_with_one_slash_is_a_data_set_of_the_hub(here: Path):
    assert list_files("org/name-v1.5#dev", key=KEY) == [DataFile("org/name-v1.5#dev", "datasets")]
    (streamed,) = list_files("org/name", key=KEY, datasets_type="iterable")
    assert streamed.format == "datasets stream"


@pytest.mark.parametrize("name", ["data/trian", "data/trian#dev", "gone/train.txt", "a/b.tar.gz"])
def test_a_mistyped_path_is_no_data_set_of_the_hub(here: Path, name: str):
    with pytest.raises(ConfigError, match=f"{name} does not exist"):
        list_files(name, key=KEY)


def test_a_data_set_that_cannot_be_loaded_says_so(here: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no way\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    (file,) = list_files("org/name", key="data.eval_path")
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert str(caught.value) == (
        "org/name: data.eval_path names no file or folder here, and as a data set of the hub it "
        "cannot be loaded (no way to the hub). To fix: correct the path, or the id (a split stands "
        "behind a #) and see that the hub can be reached."
    )
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk("saved")
    (file,) = list_files("saved", key=KEY)
    (here / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved: the data set cannot be loaded"):
        list(read_rows(file))


def test_without_a_network_a_data_set_of_the_hub_fails_at_once(here: Path):
    (file,) = list_files("org/name", key=KEY)  # HF_HUB_OFFLINE is set for all tests
    with pytest.raises(DataError, match=r"org/name: data\.train_path names no .*OfflineMode"):
        fingerprint(file)


def test_a_reader_of_the_users_own_takes_the_path_as_it_is(here: Path):
    (file,) = list_files("4", key=KEY, datasets_type="tests.helpers.readers:Countdown")
    assert [row.data for row in read_rows(file)] == [{"text": str(i)} for i in (4, 3, 2, 1)]
    assert [row.row for row in read_rows(file, start=2)] == [3, 4]
    assert fingerprint(file) == "countdown-4"
    with pytest.raises(ConfigError, match=r"data\.datasets_type: 'mine' is not known"):
        list_files("4", key=KEY, datasets_type="mine")


def test_all_problems_of_a_list_are_told_together(here: Path):
    with pytest.raises(ConfigError) as caught:
        list_files("gone.jsonl, data/x.txt, empty, gone*, memory://gone/x.jsonl", key=KEY)
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 5
    for text, problem in zip(
        (
            "gone.jsonl does not exist",
            "data/x.txt has an unknown ending",
            "the folder empty holds no data file",
            "the pattern gone* holds no data file",
            "memory://gone/x.jsonl does not exist",
        ),
        found,
        strict=True,
    ):
        assert problem.startswith(f"{KEY}: {text}")


def test_nothing_and_the_same_twice_are_refused(here: Path):
    with pytest.raises(ConfigError, match="names no file"):
        list_files(" , ", key=KEY)
    for twice in ("data/b.jsonl,data/b.jsonl", "data/b.jsonl,./data/b.jsonl", f"data,{here}/data"):
        with pytest.raises(ConfigError, match=r"names .*data/b\.jsonl.* more than once"):
            list_files(twice, key=KEY)


def test_a_path_with_a_comma_is_tried_whole_first(here: Path):
    (here / "a,b.jsonl").touch()
    assert names(list_files("a,b.jsonl", key=KEY)) == [("a,b.jsonl", "jsonl")]
    (here / "data" / "e,f").mkdir()
    (here / "data" / "e,f" / "x.csv").touch()
    assert names(list_files("data/e,f", key=KEY)) == [("x.csv", "csv")]


def test_a_fingerprint_is_of_the_contents(here: Path):
    file = DataFile("data/b.jsonl", "jsonl")
    before = fingerprint(file)
    Path("data/b.jsonl").write_text(json.dumps({"a": 1}))
    assert fingerprint(file) != before
    with pytest.raises(DataError, match=r"gone\.jsonl: the file cannot be read \(No such file"):
        fingerprint(DataFile("gone.jsonl", "jsonl"))
