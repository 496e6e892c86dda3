import numpy as np
import pytest

from omnilit.data.quarantine import BadRecord
from omnilit.tools.data_report import (
    Packing,
    PartReport,
    PassShare,
    SourceData,
    build_histograms,
    build_tables,
    count_duplicates,
    format_share,
    merge_sources,
    percentile,
    shorten,
)


def source(name="a", lengths=(4, 6), targets=(2, 0), digests=(1, 2), **more):
    arrays = [np.asarray(values, np.int64) for values in (lengths, targets, digests)]
    return SourceData(name, *arrays, num_records=more.pop("num_records", len(lengths)), **more)


def cells(tables, title):
    (table,) = [table for table in tables if table.title == title]
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


@pytest.mark.parametrize(
    ("percent", "value"), [(1, 1), (50, 50), (90, 90), (99, 99), (100, 100), (0, 1)]
)
def test_percentiles_of_one_to_a_hundred_are_themselves(percent, value):
    values = np.random.default_rng(0).permutation(np.arange(1, 101))
    assert percentile(values, max(percent, 1) if percent == 0 else percent) == value


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 99, 101, 250])
@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
def test_percentile_is_the_least_value_that_enough_do_not_exceed(size, percent):
    values = np.random.default_rng(size).integers(1, 30, size)
    found = percentile(values, percent)
    enough = [v for v in values.tolist() if 100 * (values <= v).sum() >= percent * size]
    assert found == min(enough)


def test_nothing_has_no_percentile():
    assert percentile(np.zeros(0, np.int64), 50) == 0


def test_a_duplicate_is_counted_once_less_than_it_stands_there():
    assert count_duplicates(np.asarray([7, 8, 7, 7, 9, 8])) == 3


def test_a_sample_of_two_sources_is_a_duplicate_of_the_whole_only():
    one, two = source("a", digests=(1, 2)), source("b", digests=(2, 3))
    part = PartReport("train", (one, two))
    rows = cells(build_tables(part), "train: records")
    assert [(row["source"], row["duplicates"]) for row in rows] == [
        ("a", "0"),
        ("b", "0"),
        ("all", "1"),
    ]


def test_a_single_source_is_not_repeated_as_all():
    rows = cells(build_tables(PartReport("train", (source(),))), "train: records")
    assert [row["source"] for row in rows] == ["a"]


def test_every_count_stands_in_its_column():
    one = source(
        num_records=5000, num_truncated=11, num_cut=3, num_dropped=7, num_bad=5, num_unsupervised=1
    )
    (row,) = cells(build_tables(PartReport("eval", (one,))), "eval: records")
    assert row == {
        "source": "a",
        "records": "5,000",
        "samples": "2",
        "duplicates": "0",
        "truncated": "11",
        "cut turns": "3",
        "dropped": "7",
        "unsupervised": "1",
        "bad": "5",
    }


def test_tokens_and_their_supervised_share():
    (row,) = cells(build_tables(PartReport("train", (source(),))), "train: tokens")
    assert row == {
        "source": "a",
        "tokens": "10",
        "supervised": "2",
        "share": "20.0 %",
        "p1": "4",
        "p50": "4",
        "p90": "6",
        "p99": "6",
        "max": "6",
    }


def test_all_adds_up_and_joins():
    whole = merge_sources([source(num_bad=1, num_cut=2), source("b", num_bad=3, num_dropped=4)])
    assert (whole.num_records, whole.num_bad, whole.num_cut, whole.num_dropped) == (4, 4, 2, 4)
    assert whole.lengths.tolist() == [4, 6, 4, 6]
    assert whole.labels is None


def test_padding_share_is_what_the_budgets_leave_empty():
    packing = Packing(num_micro_batches=4, num_tokens=30, budget=10, way="best fit")
    assert packing.padding_share == pytest.approx(0.25)
    rows = cells(build_tables(PartReport("train", (source(),), packing)), "train: packing")
    values = {row["what"]: row["value"] for row in rows}
    assert values["efficiency"] == "75.000 %"
    assert values["padding share"] == "25.000 %"


def test_batches_of_samples_have_no_padding_to_speak_of():
    packing = Packing(4, 30, None, "2 samples each")
    assert packing.padding_share is None
    rows = cells(build_tables(PartReport("train", (source(),), packing)), "train: packing")
    assert "padding share" not in {row["what"] for row in rows}


def test_the_shares_of_a_mixture_are_of_its_pass():
    shares = (PassShare("a", 30, 100), PassShare("b", 10, 300))
    part = PartReport("train", (source(), source("b")), shares=shares)
    rows = cells(build_tables(part), "train: first pass of the mixture")
    assert [(r["share"], r["share of tokens"]) for r in rows] == [
        ("75.0 %", "25.0 %"),
        ("25.0 %", "75.0 %"),
    ]


def test_bad_records_show_place_and_reason_and_how_many_more_there_are():
    bad = (BadRecord("a", "x.jsonl", 3, "is\nnot \x1b[2J JSON", "mend it"),)
    part = PartReport("train", (source(num_bad=30),), bad=bad)
    rows = cells(build_tables(part), "train: bad records, the first 1 of 30")
    assert rows == [
        {"where": "x.jsonl:3", "reason": "is not \\x1b[2J JSON", "fix": "mend it"},
    ]
    assert (part.num_records, part.num_bad) == (2, 30)


def test_without_tokens_there_is_no_table_of_them():
    part = PartReport("train", (source(lengths=(), targets=(), digests=(), num_records=9),))
    assert [table.title for table in build_tables(part)] == ["train: records"]
    assert build_histograms(part) == []


def test_pairs_have_a_histogram_for_each_answer():
    one = source(lengths=(10, 12), pair_starts=np.asarray([4, 5]))
    chosen, rejected = build_histograms(PartReport("train", (one,)))
    assert ("chosen" in chosen.title, "rejected" in rejected.title) == (True, True)
    assert dict(zip(chosen.labels, chosen.counts, strict=True)) == {"4": 1, "5": 1}
    assert dict(zip(rejected.labels, rejected.counts, strict=True)) == {"6": 1, "7": 1}


def test_classes_have_a_histogram_beside_the_lengths():
    one = source(labels=np.asarray([3, 0]))
    _, classes = build_histograms(PartReport("train", (one,)))
    assert (classes.labels, classes.counts) == (("0", "3"), (1, 1))


def test_long_texts_are_cut_at_the_limit():
    assert shorten("x" * 10, 10) == "x" * 10
    assert shorten("x" * 11, 10) == "x" * 7 + "..."


def test_a_share_of_nothing_is_a_dash():
    assert (format_share(0, 0), format_share(1, 3)) == ("-", "33.3 %")
