import numpy as np
import pytest

from omnilit.tools.report.axis import Axis, fit_ratios, fit_values, format_value, linear_ticks


def test_a_linear_axis_places_in_proportion_upside_down_too():
    axis = Axis(10, 30, 200, 0)
    np.testing.assert_allclose(axis.place(np.array([10.0, 15.0, 30.0])), [200, 150, 0])


def test_a_logarithmic_axis_gives_equal_ratios_equal_lengths():
    axis = Axis(0.01, 100, 0, 400, is_log=True)
    np.testing.assert_allclose(axis.place(np.array([0.01, 0.1, 1, 100])), [0, 100, 200, 400])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1.3, 7.2, [2, 3, 4, 5, 6, 7]),
        (0, 3e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]),
    ],
)
def test_linear_ticks_are_round_numbers(low, high, ticks):
    np.testing.assert_allclose(linear_ticks(low, high), ticks, atol=1e-12)


@pytest.mark.parametrize("high", [1.001, 2, 3.7, 49, 1e5, 3e-9])
def test_there_are_four_to_eleven_ticks(high):
    assert 4 <= len(linear_ticks(0, high)) <= 11


def test_ticks_of_steps_are_whole():
    assert linear_ticks(1, 3, is_whole=True) == [1, 2, 3]


def test_ticks_of_a_logarithmic_axis_are_decades_or_between():
    assert Axis(0.001, 10, 0, 1, is_log=True).ticks() == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert Axis(0.9, 12, 0, 1, is_log=True).ticks() == pytest.approx([1, 3, 10])
    assert Axis(2.1, 2.4, 0, 1, is_log=True).ticks() == pytest.approx(
        [2.1, 2.15, 2.2, 2.25, 2.3, 2.35, 2.4]
    )
    assert len(Axis(1e-30, 1, 0, 1, is_log=True).ticks()) <= 8


def test_the_range_leaves_room_and_may_begin_at_zero():
    assert fit_values(np.array([2.0, 4.0]), has_zero=False) == pytest.approx((1.9, 4.1))
    assert fit_values(np.array([2.0, 4.0]), has_zero=True) == pytest.approx((0, 4.2))
    assert fit_values(np.array([-2.0, 4.0]), has_zero=True) == pytest.approx((-2.3, 4.3))


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-300])
@pytest.mark.parametrize("has_zero", [True, False])
def test_one_value_has_a_range_around_it(value, has_zero):
    low, high = fit_values(np.array([value, value]), has_zero=has_zero)
    assert low <= value <= high
    assert low < high


def test_the_range_of_ratios_is_above_zero():
    low, high = fit_ratios(np.array([0.1, 10.0]))
    assert (low, high) == pytest.approx((10**-1.1, 10**1.1))
    low, high = fit_ratios(np.array([3.0]))
    assert 0 < low < 3 < high


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.25, "0.25"), (5e-5, "5e-5"), (-2.5e-4, "-2.5e-4"), (1000, "1k"),
        (1500, "1.5k"), (1234, "1234"), (12_345, "12.35k"), (100_000, "100k"), (2_000_000, "2M"),
        (3.14159, "3.142"), (1e13, "10T"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert format_value(value) == text
