import pytest

from omnilit.data.quarantine import BadRecord
from omnilit.tools.report.runs import Origin, SavedStep, read_run
from omnilit.tools.report.summary import (
    describe_origins,
    format_bytes,
    format_time,
    list_bad,
    list_evaluations,
    list_saved,
    summarize,
)
from tests.helpers.runs import step_line, write_lines, write_run


def rows(table):
    return {label: cells for label, *cells in table.rows}


def lines_of(folder, lines):
    return read_run(write_lines(folder / "metrics.jsonl", lines).parent, folder.name)


def test_a_run_in_numbers(tmp_path):
    table = summarize([read_run(write_run(tmp_path / "a", 20, numbers={"mfu": 0.25}), "a")])
    assert (table.title, table.header) == ("Summary", ("", "a"))
    found = {label: cell for label, (cell,) in rows(table).items()}
    assert found.pop("newest line").endswith("UTC")
    assert found == {
        "last step": "20",
        "loss, last step": "0.2",
        "loss, mean of the last 10% of steps": "0.20526",  # (4 / 19 + 4 / 20) / 2
        "evaluation loss, last": "0.25",
        "evaluation loss, best": "0.25 at step 20",
        "supervised tokens": "2,000",
        "tokens in all": "4,000",
        "time in steps": "10.0 s",
        "tokens/s, median": "400",
        "step time, median s": "0.5",
        "waiting for data": "2.0% of the time",
        "peak memory, GiB": "1.5",
        "mfu, median": "0.25",
        "skipped steps": "0",
    }


def test_the_best_evaluation_is_not_the_last_one(tmp_path):
    losses = [3.0, 1.0, None, 2.0]
    run = lines_of(tmp_path / "a", [{"step": i, "eval_loss": v} for i, v in enumerate(losses)])
    found = rows(summarize([run]))
    assert found["evaluation loss, best"] == ["1 at step 1"]
    assert found["evaluation loss, last"] == ["2"]


def test_a_run_without_a_number_shows_a_dash_beside_one_that_has_it(tmp_path):
    full = read_run(write_run(tmp_path / "a"), "a")
    bare = lines_of(tmp_path / "b", [{"step": 7, "loss": 2.0}])
    found = rows(summarize([full, bare]))
    assert found["last step"] == ["20", "7"]
    assert found["tokens in all"] == ["4,000", "-"]
    assert "mfu, median" not in found


def test_runs_without_a_step_have_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert summarize([read_run(tmp_path, "a")]).rows == ()


def test_what_is_not_finite_is_counted_and_placed(tmp_path):
    lines = [step_line(1), step_line(2, loss=None), step_line(3, loss=None, grad_norm=None)]
    found = rows(summarize([lines_of(tmp_path / "a", lines)]))
    assert found["numbers that are not finite"] == [
        "loss 2, first at step 2; grad_norm 1, first at step 3"
    ]
    # not the 4 of the step before: this run has diverged
    assert found["loss, last step"] == ["not finite"]
    assert found["loss, mean of the last 10% of steps"] == ["not finite"]


def test_resumes_and_earlier_runs_are_counted(tmp_path):
    folder = write_run(tmp_path / "a")
    write_lines(folder / "metrics.jsonl.1", [step_line(1)])
    write_lines(folder / "metrics.jsonl.2", [step_line(11)])
    (folder / "metrics.jsonl.3").write_text("torn")
    found = rows(summarize([read_run(folder, "a")]))
    assert found["resumes that redid steps"] == ["2, after step 10"]
    assert found["earlier runs set aside"] == ["1"]


def with_parts(run, **parts):
    return type(run)(**{name: getattr(run, name) for name in type(run).__slots__} | parts)


def test_processes_versions_and_kernels_stand_side_by_side(tmp_path):
    run = read_run(write_run(tmp_path / "a"), "a")
    one = with_parts(run, origin=Origin(1, {"torch": "2.13"}, {"rms_norm": "eager"}))
    four = with_parts(run, name="b", origin=Origin(4, {"torch": "2.14", "x": "1"}, {}))
    none = with_parts(run, name="c")
    table = describe_origins([one, four, none])
    assert table.header == ("", "a", "b", "c")
    assert rows(table) == {
        "processes": ["1", "4", "-"],
        "torch": ["2.13", "2.14", "-"],
        "x": ["-", "1", "-"],
        "rms_norm": ["eager", "-", "-"],
    }
    assert describe_origins([none]).rows == ()


def test_tables_of_a_run_list_what_was_found(tmp_path):
    run = with_parts(
        read_run(write_run(tmp_path / "a"), "a"),
        saved=(SavedStep("global_step_2", 2, "complete", has_export=True, num_bytes=2048),),
        bad=(BadRecord("docs", "f.jsonl", 3, "no text", "mend it"),),
        bad_counts={"docs": 1200},
        evaluations=({"checkpoint": None, "eval_loss": 1.23456789}, {"eval_loss": 2.0, "n": 3}),
    )
    assert list_saved(run).rows == (("global_step_2", "complete", "hf_ckpt", "2.0 KiB"),)
    assert list_bad(run).title == "a: bad records skipped (docs 1,200)"
    assert list_bad(run).rows == (("f.jsonl:3", "no text", "mend it"),)
    assert list_evaluations(run).header == ("checkpoint", "eval_loss", "n")
    assert list_evaluations(run).rows == (("-", "1.2346", "-"), ("-", "2", "3"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, None), (5.24, "5.2 s"), (60, "0:01:00"), (3723.4, "1:02:03"), (360_000, "100:00:00")],
)
def test_times_are_readable(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_sizes_are_readable(number, text):
    assert format_bytes(number) == text
