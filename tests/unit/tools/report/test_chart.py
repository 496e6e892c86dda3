import json
import re

import numpy as np
import pytest

from omnilit.tools.report.axis import Axis
from omnilit.tools.report.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    Curve,
    Frame,
    draw_chart,
    draw_path,
)
from omnilit.tools.report.metrics import Series

X = Axis(0, 100, 0, 200)
Y = Axis(0, 10, 50, 0)


def series(steps, values):
    return Series(np.asarray(steps, np.int64), np.asarray(values, np.float64))


def places(path):
    """Absolute points of each stretch of a path, in units of the picture."""
    stretches = []
    for text in path.split("M")[1:]:
        first, _, rest = text.partition("l")
        deltas = np.array([first.split(), *zip(*[iter(rest.split())] * 2, strict=True)], float)
        stretches.append((deltas.cumsum(axis=0) / 10).tolist())
    return stretches


def paths(html, view, name="raw"):
    """The paths of a class in a view, by their run."""
    (body,) = re.findall(rf'<g class="view {view}".*?(?=<g class="view|</svg>)', html)
    curves = re.findall(r'<g class="curve r(\d+)[^"]*"[^>]*>(.*?)</g>', body)
    path = re.compile(rf'<path class="{name}" d="([^"]*)"')
    return {int(run): path.findall(lines) for run, lines in curves}


def points_of(html):
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    return {run: (np.cumsum(steps).tolist(), values) for run, steps, values in json.loads(text)}


def test_a_curve_lies_where_its_values_are():
    path = draw_path(series([0, 50, 100], [0, 10, 2.5]), X, Y)
    assert path == "M0 500l1000 -500 1000 375"
    assert places(path) == [[[0, 50], [100, 0], [200, 37.5]]]


def test_a_gap_parts_a_curve_and_a_lone_point_is_a_dot():
    path = draw_path(series([0, 10, 20, 30, 40, 50], [1, 1, np.nan, 2, np.nan, 3]), X, Y)
    assert places(path) == [[[0, 45], [20, 45]], [[60, 40], [60, 40]], [[100, 35], [100, 35]]]


def test_rounding_does_not_add_up_along_a_curve():
    steps = np.arange(1000)
    path = draw_path(series(steps, steps / 100), Axis(0, 999, 0, 333), Y)
    (found,) = places(path)
    np.testing.assert_allclose(found, np.stack([steps / 3, 50 - steps / 20], 1), atol=0.051)


def test_curves_fill_the_plot_from_the_first_step_to_the_last():
    curves = (Curve(0, series([1, 6, 11], [1, 2, 3])), Curve(1, series([1, 21], [2, 2])))
    html = draw_chart(Chart("Loss", curves), Frame(1, 21, 100))
    drawn = paths(html, "v0 linear")
    middle = (BOTTOM + TOP) / 2
    (first,) = places(drawn[0][0])
    (second,) = places(drawn[1][0])
    np.testing.assert_allclose(first[1], [LEFT + (RIGHT - LEFT) / 4, middle])
    assert second == [[LEFT, middle], [RIGHT, middle]]
    low, high = 1 - 0.1, 3 + 0.1
    scale = (BOTTOM - TOP) / (high - low)
    np.testing.assert_allclose(first[0], [LEFT, BOTTOM - (1 - low) * scale], atol=0.051)


def test_the_last_half_and_tenth_are_views_of_their_own():
    curve = Curve(0, series(range(101), range(101)))
    html = draw_chart(Chart("x", (curve,)), Frame(0, 100, 100))
    for view, num_points in (("v0 linear", 101), ("v1 linear", 51), ("v2 linear", 11)):
        ((path,),) = paths(html, view).values()
        ((*_, last),) = places(path)
        assert len(places(path)[0]) == num_points
        assert last[0] == RIGHT
    assert 'data-x="90.0 100"' in html


def test_a_run_that_ended_earlier_is_missing_from_the_last_tenth():
    curves = (Curve(0, series([0, 100], [1, 2])), Curve(1, series([0, 50], [1, 2])))
    html = draw_chart(Chart("x", curves), Frame(0, 100, 100))
    assert paths(html, "v2 linear")[1] == [""]


def test_a_range_without_any_value_is_empty():
    html = draw_chart(Chart("x", (Curve(0, series([0, 5], [1, 2])),)), Frame(0, 100, 100))
    assert paths(html, "v2 linear") == {0: [""]}


def test_a_logarithmic_view_leaves_out_what_is_not_above_zero():
    curve = Curve(0, series([0, 1, 2, 3], [0, 1, 10, 100]))
    html = draw_chart(Chart("x", (curve,), has_log=True), Frame(0, 3, 100))
    ((path,),) = paths(html, "v0 logarithmic").values()
    (stretch,) = places(path)
    heights = [y for _, y in stretch]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert 'class="log"' in html


@pytest.mark.parametrize("values", [[0, 0], [-1, -2]])
def test_without_a_value_above_zero_there_is_no_logarithmic_view(values):
    chart = Chart("x", (Curve(0, series([0, 1], values)),), has_log=True)
    assert "logarithmic" not in draw_chart(chart, Frame(0, 1, 100))


def test_a_noisy_curve_has_its_means():
    curve = Curve(0, series(range(1, 6), [0, 10, 0, 10, 5]))
    html = draw_chart(Chart("x", (curve,), is_noisy=True), Frame(1, 5, 100))
    ((mean,),) = paths(html, "v0 linear", "mean m2").values()
    heights = {y for _, y in places(mean)[0]}
    assert len(heights) == 1  # a window over all steps
    assert 'class="curve r0 noisy"' in html


def test_few_sparse_values_have_dots_and_many_have_none():
    few = Chart("x", (Curve(0, series([0, 1], [1, 2])),), is_sparse=True)
    many = Chart("x", (Curve(0, series(range(100), range(100))),), is_sparse=True)
    ((dots,),) = paths(draw_chart(few, Frame(0, 1, 100)), "v0 linear", "dots").values()
    assert len(places(dots)) == 2
    assert paths(draw_chart(many, Frame(0, 99, 100)), "v0 linear", "dots") == {0: []}


def test_a_resume_is_marked_at_its_step():
    curve = Curve(0, series([0, 100], [1, 2]), resumed_at=(50,))
    html = draw_chart(Chart("x", (curve,)), Frame(0, 100, 100))
    ((mark,),) = paths(html, "v0 linear", "resumed").values()
    assert mark == f"M{(LEFT + RIGHT) // 2 * 10} {TOP * 10}V{BOTTOM * 10}"


def test_the_points_to_point_at_are_the_measured_values():
    curve = Curve(3, series([5, 7, 8], [1 / 3, np.nan, 2]))
    assert points_of(draw_chart(Chart("x", (curve,)), Frame(5, 8, 100))) == {
        3: ([5, 8], [0.333333, 2.0])
    }


def test_a_long_run_is_small_and_its_last_tenth_finer_than_the_whole():
    values = np.random.default_rng(0).normal(size=50_000)
    curve = Curve(0, series(range(1, 50_001), values))
    html = draw_chart(Chart("x", (curve,), has_log=True, is_noisy=True), Frame(1, 50_000, 280))
    assert len(html) < 80_000
    steps = np.array(points_of(html)[0][0])
    assert (steps > 45_000).mean() > 0.3


def test_names_are_escaped():
    chart = Chart("<b>&", (Curve(0, series([0, 1], [1, 2])),), unit='"<i>')
    html = draw_chart(chart, Frame(0, 1, 100))
    assert "<b>&lt;b&gt;&amp;</b>" in html
    assert '<span class="unit">&quot;&lt;i&gt;</span>' in html
    assert 'aria-label="&lt;b&gt;&amp; over steps, 1 curves"' in html
