"""Streams of several virtual shards: passes, mixtures, resumes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from omnilit.data.files import DataFile
from omnilit.data.quarantine import BadRecord
from omnilit.data.readers import RawRow, read_rows
from omnilit.data.streams import rows as stream_rows
from omnilit.data.streams import stream
from omnilit.data.streams.rows import Blocks, deal_files
from omnilit.data.streams.state import ShardState
from omnilit.data.streams.stream import count_shards
from omnilit.data.warmup import BudgetSchedule
from omnilit.errors import ConfigError, DataError
from tests.helpers.streams import Ranks, open_stream, settings, write_rows


def rows(number: int, *, seed: int = 0, chunks: int = 1) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    return [{"sizes": [draw.randint(1, 9) for _ in range(chunks)]} for _ in range(number)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", rows(90))


@pytest.mark.parametrize("num_shards", [1, 4, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_every_pass_reads_every_record_once(file: Path, num_shards: int, size: int):
    ranks = Ranks(lambda: open_stream({"a": [file]}, settings(num_shards)), size=size)
    passes = ranks.run_passes(3)
    everything = Counter(("a", "a.jsonl", row) for row in range(1, 91))
    assert passes == [everything] * 3


@pytest.mark.parametrize("number", [1, 3, 50])
def test_data_with_fewer_records_than_shards_is_read_whole(tmp_path: Path, number: int):
    file = write_rows(tmp_path / "few.jsonl", rows(number))
    ranks = Ranks(lambda: open_stream({"a": [file]}, settings(64)), size=2)
    for read in ranks.run_passes(2):
        assert read == Counter(("a", "few.jsonl", row) for row in range(1, number + 1))


def test_files_of_very_different_size_are_read_alike(tmp_path: Path):
    sizes = {"large": 300, "b": 10, "c": 10, "d": 10}
    files = [write_rows(tmp_path / f"{n}.jsonl", rows(size)) for n, size in sizes.items()]
    ranks = Ranks(lambda: open_stream({"a": files}, settings(4)))
    (read,) = ranks.run_passes(1)
    assert set(read.values()) == {1}
    assert read.total() == 330


def test_files_that_are_alike_are_read_by_one_reader_each(tmp_path: Path, monkeypatch):
    opened: list[str] = []

    def count(file: DataFile) -> Iterator[RawRow]:
        opened.append(file.path)
        return read_rows(file)

    monkeypatch.setattr(stream_rows, "read_rows", count)
    files = [write_rows(tmp_path / f"{i}.jsonl", [{"sizes": [4]}] * 20) for i in range(8)]
    ranks = Ranks(lambda: open_stream({"a": files}, settings(4)), size=4)
    ranks.run(1)
    assert len(opened) == len(set(opened)) == 8
    ranks.run_passes(1)
    assert set(ranks.run_passes(1)[0].values()) == {1}


def test_passes_have_other_orders(file: Path):
    ranks = Ranks(lambda: open_stream({"a": [file]}, settings(2)))
    first = ranks.run(4)
    ranks.run_passes(1)
    assert ranks.run(4) != first


def test_the_order_does_not_depend_on_the_number_of_ranks(file: Path):
    one = Ranks(lambda: open_stream({"a": [file]}, settings(4)), window_size=4).run(30)
    for size, window_size in ((2, 2), (4, 1)):
        ranks = Ranks(
            lambda: open_stream({"a": [file]}, settings(4)), size=size, window_size=window_size
        )
        assert ranks.run(30) == one


MIXTURES = [
    ("first_exhausted", "sample"),
    ("all_exhausted", "token"),
    ("never_exhausted", "sample"),
]


@pytest.mark.parametrize(("stopping", "level"), MIXTURES)
@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_resume_at_other_ranks_loses_and_repeats_nothing(
    tmp_path: Path, stopping: str, level: str, num_shards: int
):
    sources = {
        "a": [write_rows(tmp_path / "a.jsonl", rows(70))],
        "b": [write_rows(tmp_path / "b.jsonl", rows(25, seed=1, chunks=2))],
    }
    last = 40

    def ranks(size: int) -> Ranks:
        return Ranks(
            lambda: open_stream(
                sources, settings(num_shards), weights=(0.6, 0.4), stopping=stopping, level=level
            ),
            size=size,
            window_size=4 // size,
        )

    undisturbed = ranks(1).run(last)
    draw = random.Random(num_shards)
    for _ in range(6):
        saved_at, before, after = draw.randint(1, last - 1), *draw.sample([1, 2, 4], 2)
        first = ranks(before)
        assert first.run(saved_at) == undisturbed[:saved_at]
        second = ranks(after)
        second.load(first.save())
        assert second.run(last - saved_at) == undisturbed[saved_at:]


def test_a_warm_up_goes_on_over_passes_and_a_resume(file: Path):
    warming = replace(settings(2), budget=BudgetSchedule(16, 4, 40, items_per_step=2))

    def ranks(size: int) -> Ranks:
        return Ranks(lambda: open_stream({"a": [file]}, warming), size=size, window_size=2 // size)

    undisturbed = ranks(1).run(60)
    assert undisturbed[0].total() < undisturbed[-3].total()
    first = ranks(2)
    first.run(45)
    second = ranks(1)
    second.load(first.save())
    assert second.run(15) == undisturbed[45:]


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_a_small_source_does_not_stop_a_mixture(tmp_path: Path, stopping: str):
    sources = {
        "a": [write_rows(tmp_path / "a.jsonl", rows(400))],
        "b": [write_rows(tmp_path / "b.jsonl", rows(5, seed=1))],
    }
    ranks = Ranks(lambda: open_stream(sources, settings(8), stopping=stopping))
    read = sum(ranks.run(150), Counter())
    of_b = sum(count for (source, _, _), count in read.items() if source == "b")
    assert 0.4 < of_b / read.total() < 0.6


def test_a_source_that_is_never_used_up_first_is_read_to_its_end_all_the_same(tmp_path: Path):
    sources = {
        "a": [write_rows(tmp_path / "a.jsonl", rows(300))],
        "b": [write_rows(tmp_path / "b.jsonl", rows(20, seed=1))],
    }
    ranks = Ranks(lambda: open_stream(sources, settings(2), stopping="first_exhausted"))
    read = sum(ranks.run_passes(30), Counter())
    assert len({row for source, _, row in read if source == "a"}) == 300


@pytest.mark.parametrize("level", ["sample", "token"])
def test_weights_are_shares_of_samples_or_tokens_also_where_records_are_cut(
    tmp_path: Path, level: str
):
    sources = {
        "a": [write_rows(tmp_path / "a.jsonl", [{"sizes": [8] * 6}] * 400)],
        "b": [write_rows(tmp_path / "b.jsonl", [{"sizes": [2]}] * 4000)],
    }
    ranks = Ranks(lambda: open_stream(sources, settings(1), level=level, stopping="all_exhausted"))
    ranks.run(2000)
    _, (saved,) = ranks.save()
    state = ShardState.of(saved["shards"]["0"])
    of_a, of_b = state.samples if level == "sample" else state.tokens
    assert of_a / (of_a + of_b) == pytest.approx(0.5, abs=0.05)


def test_drop_last_leaves_out_what_fills_no_micro_batch(tmp_path: Path):
    file = write_rows(tmp_path / "a.jsonl", rows(10))
    for drop_last, expected in ((True, 9), (False, 10)):
        chosen = settings(1, samples_per_item=3, drop_last=drop_last)
        (read,) = Ranks(lambda chosen=chosen: open_stream({"a": [file]}, chosen)).run_passes(1)
        assert read.total() == expected


def test_what_became_of_records_is_summed_and_said(tmp_path: Path, caplog):
    bad: list[BadRecord] = []
    file = write_rows(
        tmp_path / "a.jsonl",
        [{"sizes": [4]}] * 200 + [{"sizes": [4], "cut": True}] * 3 + [{"bad": True}] * 2,
    )
    chosen = settings(2, is_silent=True)
    ranks = Ranks(lambda: open_stream({"a": [file]}, chosen, on_bad=bad.extend))
    with caplog.at_level("INFO", logger="omnilit"):
        ranks.run_passes(1)
    assert "stream: 205 records, 203 samples, 2 bad, 3 truncated, 3 cut" in caplog.text
    assert {record.row for record in bad} == {204, 205}


def test_too_many_bad_records_stop_a_short_run_at_its_end(tmp_path: Path):
    file = write_rows(tmp_path / "a.jsonl", [{"sizes": [4]}] * 20 + [{"bad": True}] * 5)
    ranks = Ranks(lambda: open_stream({"a": [file]}, settings(1, is_silent=True)))
    with pytest.raises(DataError, match="5 of 25 records are bad"):
        ranks.run_passes(1)
    short = Ranks(lambda: open_stream({"a": [file]}, settings(1, is_silent=True)))
    with pytest.raises(DataError, match="records are bad"):
        short.run(4)


def test_the_mask_of_a_files_first_record_is_checked(tmp_path: Path):
    files = [
        write_rows(tmp_path / "a.jsonl", rows(3)),
        write_rows(tmp_path / "b.jsonl", [{"sizes": [2], "bad mask": True}]),
    ]
    with pytest.raises(DataError, match="bad mask"):
        Ranks(lambda: open_stream({"a": files}, settings(1))).run_passes(1)


def test_a_pass_without_anything_to_train_is_an_error(tmp_path: Path):
    file = write_rows(tmp_path / "a.jsonl", [{"sizes": []}] * 7)
    for sources in ({"a": [file]}, {"a": [file], "b": [file]}):
        ranks = Ranks(lambda s=sources: open_stream(s, settings(2), stopping="never_exhausted"))
        with pytest.raises(DataError, match=r"whole pass gave no record|no record of any source"):
            ranks.run(60)


def test_a_resume_notices_other_contents_of_the_same_size(file: Path):
    ranks = Ranks(lambda: open_stream({"a": [file]}, settings(1)))
    ranks.run(2)
    saved = ranks.save()
    text = file.read_text()
    file.write_text(text.replace('"sizes": [4]', '"sizes": [5]'))
    with pytest.raises(ConfigError, match=r"this changed: data\.train_path"):
        Ranks(lambda: open_stream({"a": [file]}, settings(1))).load(saved)
    copy = file.with_name("copy.jsonl")
    copy.write_text(text)
    Ranks(lambda: open_stream({"a": [copy]}, settings(1))).load(saved)


def test_files_are_dealt_whole_only_where_shares_are_even():
    assert deal_files([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert deal_files([30, 10, 10, 10], 2) == [[0], [1, 2, 3]]
    assert deal_files([50, 10, 10, 10], 2) is None
    assert deal_files([5, None], 2) is None
    assert deal_files([5], 2) is None


def test_blocks_are_read_again_when_they_are_no_longer_kept(file: Path):
    blocks = Blocks([DataFile(str(file), "jsonl")], 20)
    first = blocks.get(0)
    assert [len(blocks.get(i)) for i in (1, 2, 3, 4, 5)] == [20, 20, 20, 10, 0]
    assert blocks.get(0) == first
    assert [raw.row for _, raw in blocks.get(3)] == list(range(61, 81))


def test_the_number_of_shards_follows_the_data(tmp_path: Path, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl", rows(10))
    data = DataFile(str(file), "jsonl")
    assert count_shards([[data]]) == 1
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    assert count_shards([[data]]) == 64  # one file: every reader reads it
    assert count_shards([[data] * 100]) == 64
    assert count_shards([[data] * 128]) == 128
    monkeypatch.setattr(stream, "file_size", lambda _: None)
    assert count_shards([[data]]) == 1  # ten rows were counted
    monkeypatch.setattr(stream, "BLOCK_ROWS", 10)
    assert count_shards([[data]]) == 64
