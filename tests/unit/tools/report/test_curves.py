import numpy as np
import pytest

from omnilit.tools.report.curves import choose_windows, clip, smooth, thin_out
from omnilit.tools.report.metrics import Series


def series(values, steps=None):
    values = np.asarray(values, np.float64)
    return Series(np.arange(1, len(values) + 1) if steps is None else np.asarray(steps), values)


@pytest.mark.parametrize(("num_steps", "windows"), [(10, (5, 15)), (1000, (11, 51))])
def test_windows_grow_with_the_run_and_are_odd(num_steps, windows):
    assert choose_windows(num_steps) == windows


def test_smoothing_is_the_mean_of_the_neighbours_that_are_there():
    smoothed = smooth(series([1, 2, 6, 3, 9]), 3)
    np.testing.assert_allclose(smoothed.values, [1.5, 3, 11 / 3, 6, 6])


def test_smoothing_counts_steps_and_not_lines():
    smoothed = smooth(series([1, 3, 100], steps=[10, 11, 20]), 5)
    np.testing.assert_allclose(smoothed.values, [2, 2, 100])


def test_a_gap_stays_a_gap_and_counts_in_no_mean():
    smoothed = smooth(series([1, np.nan, 5]), 3)
    np.testing.assert_array_equal(smoothed.values, [1, np.nan, 5])


def test_a_straight_line_is_left_as_it_is_but_at_its_ends():
    line = series(np.linspace(0, 1, 101))
    np.testing.assert_allclose(smooth(line, 21).values[10:-10], line.values[10:-10])


def test_clipping_keeps_both_ends():
    assert clip(series(range(10)), 3, 5).steps.tolist() == [3, 4, 5]


def test_a_short_series_is_not_thinned_out():
    short = series(range(20))
    assert thin_out(short, 10) is short


def test_thinning_keeps_peaks_ends_and_measured_points():
    values = np.sin(np.arange(100_000) / 500)
    values[12_345], values[77_777] = 50.0, -50.0
    thin = thin_out(series(values), 100)
    assert len(thin.steps) <= 202
    assert thin.steps[0] == 1
    assert thin.steps[-1] == 100_000
    assert {12_346, 77_778} <= set(thin.steps.tolist())
    np.testing.assert_array_equal(thin.values, values[thin.steps - 1])
    assert (np.diff(thin.steps) > 0).all()


def test_a_column_keeps_its_least_and_greatest_value_in_their_order():
    thin = thin_out(series([3, 9, 1, 5, 7, 2, 8, 6]), 2)
    assert thin.steps.tolist() == [1, 2, 3, 6, 7, 8]
    assert thin.values.tolist() == [3, 9, 1, 2, 8, 6]


def test_a_column_without_a_number_keeps_one_gap():
    values = np.ones(1000)
    values[400:600] = np.nan
    thin = thin_out(series(values), 10)
    assert np.isnan(thin.values).sum() == 2
    assert thin.steps[np.isnan(thin.values)].tolist() == [401, 501]
