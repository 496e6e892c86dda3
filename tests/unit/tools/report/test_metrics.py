import json

import numpy as np

from omnilit.tools.report.metrics import SetAside, read_metrics, read_set_aside
from tests.helpers.runs import step_line, write_lines


def test_every_number_has_the_steps_of_its_lines(tmp_path):
    file = write_lines(tmp_path / "m", [step_line(step) for step in range(1, 11)])
    metrics = read_metrics(file)
    np.testing.assert_array_equal(metrics.series["loss"].steps, np.arange(1, 11))
    np.testing.assert_allclose(metrics.series["loss"].values, 4.0 / np.arange(1, 11))
    np.testing.assert_array_equal(metrics.series["eval_loss"].steps, [5, 10])
    assert "step" not in metrics.series
    assert (metrics.last_step, metrics.num_unreadable) == (10, 0)


def test_null_and_what_is_not_finite_are_gaps(tmp_path):
    values = "null", "NaN", "Infinity", "2.5"
    lines = [f'{{"step": {step}, "loss": {value}}}\n' for step, value in enumerate(values, start=1)]
    (tmp_path / "m").write_text("".join(lines))
    metrics = read_metrics(tmp_path / "m")
    np.testing.assert_array_equal(metrics.series["loss"].values, [np.nan, np.nan, np.nan, 2.5])
    finite = metrics.finite("loss")
    assert finite is not None
    assert finite.steps.tolist() == [4]
    assert metrics.finite("other") is None


def test_what_no_chart_can_hold_is_a_gap_or_nothing(tmp_path):
    values = "1e308", "-1e308", "1" + "0" * 400, "5e-324", "1e38"
    lines = [f'{{"step": {step}, "loss": {value}}}\n' for step, value in enumerate(values, start=1)]
    (tmp_path / "m").write_text("".join(lines))
    found = read_metrics(tmp_path / "m").series["loss"].values
    np.testing.assert_array_equal(found, [np.nan, np.nan, np.nan, 0.0, 1e38])


def test_a_number_that_is_never_finite_has_no_finite_series(tmp_path):
    metrics = read_metrics(write_lines(tmp_path / "m", [{"step": 1, "loss": None}]))
    assert metrics.finite("loss") is None


def test_a_torn_line_and_other_rubbish_are_counted_and_left_out(tmp_path):
    good = json.dumps(step_line(1))
    rubbish = ["[1, 2]", '"text"', '{"loss": 1}', '{"step": "x"}', '{"step": -1}', "\x00\xff", ""]
    rubbish += ['{"step": true}', f'{{"step": {10**24}}}', "[" * 100_000]
    text = "\n".join([good, *rubbish, '{"step": 2, "lo'])
    (tmp_path / "m").write_bytes(text.encode("latin-1"))
    metrics = read_metrics(tmp_path / "m")
    assert metrics.last_step == 1
    assert metrics.num_unreadable == len(rubbish) + 1


def test_what_is_no_number_is_left_out(tmp_path):
    metrics = read_metrics(write_lines(tmp_path / "m", [{"step": 1, "a": "x", "b": True, "c": 1}]))
    assert list(metrics.series) == ["c"]


def test_of_a_step_that_stands_there_twice_the_later_line_counts(tmp_path):
    steps_and_losses = [(1, 9), (2, 8), (3, 7), (2, 6), (3, 5)]
    file = write_lines(tmp_path / "m", [{"step": s, "loss": v} for s, v in steps_and_losses])
    series = read_metrics(file).series["loss"]
    assert series.steps.tolist() == [1, 2, 3]
    assert series.values.tolist() == [9, 6, 5]


def test_an_empty_or_missing_file_has_no_numbers(tmp_path):
    (tmp_path / "m").touch()
    for name in ("m", "none"):
        metrics = read_metrics(tmp_path / name)
        assert (metrics.series, metrics.last_step) == ({}, 0)


def test_lines_that_were_set_aside_tell_a_resume_from_another_run(tmp_path):
    write_lines(tmp_path / "metrics.jsonl.2", [step_line(step) for step in (41, 42)])
    write_lines(tmp_path / "metrics.jsonl.10", [step_line(1)])
    (tmp_path / "metrics.jsonl.1").write_text('{"step": 7, "lo')
    (tmp_path / "metrics.jsonl.old").touch()
    found = read_set_aside(tmp_path)
    assert found == [SetAside(None, 1), SetAside(41, 2), SetAside(1, 1)]
    assert [aside.is_resume for aside in found] == [True, True, False]
