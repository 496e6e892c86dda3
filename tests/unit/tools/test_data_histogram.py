import xml.etree.ElementTree as ET

import numpy as np
import pytest

from omnilit.errors import ConfigError
from omnilit.tools.histogram import (
    Histogram,
    bin_lengths,
    count_classes,
    draw_svg,
    draw_text,
    save_png,
    short_count,
)


@pytest.mark.parametrize("high", [1, 5, 24, 25, 100, 2048, 131072])
def test_every_value_is_in_the_range_that_its_bar_names(high):
    values = np.random.default_rng(high).integers(1, high + 1, 500)
    found = bin_lengths(values, "t")
    assert len(found.labels) <= 24
    assert sum(found.counts) == 500
    for label, count in zip(found.labels, found.counts, strict=True):
        low, _, end = label.partition("-")
        inside = (values >= int(low)) & (values <= int(end or low))
        assert count == inside.sum()


def test_few_values_get_a_bar_each():
    found = bin_lengths(np.asarray([3, 5, 5]), "t")
    assert (found.labels, found.counts) == (("3", "4", "5"), (1, 0, 2))


def test_the_width_is_the_least_that_fits():
    found = bin_lengths(np.asarray([1, 100]), "t", max_bins=24)
    assert found.labels[0] == "0-4"
    assert found.labels[-1] == "100-104"


def test_many_classes_are_the_frequent_ones_and_the_others():
    values = np.asarray([*range(100), *range(39)])
    found = count_classes(values, "t")
    assert found.labels == (*map(str, range(39)), "61 others")
    assert found.counts == (*[2] * 39, 61)


def test_text_bars_are_proportional_and_show_the_smallest_count():
    text = draw_text(Histogram("t", ("a", "bb", "c"), (1000, 500, 1)), width=10)
    assert text.splitlines() == [
        "t",
        "   a  1,000  ##########",
        "  bb    500  #####",
        "   c      1  #",
    ]


def test_an_empty_range_has_no_bar():
    assert draw_text(Histogram("t", ("a", "b"), (0, 2)), width=2).splitlines()[1] == "  a  0"


def test_the_drawing_is_xml_with_one_bar_a_range():
    svg = draw_svg(Histogram('t"<&', ("<a>", "b"), (3, 0)))
    root = ET.fromstring(svg)
    bars = [node for node in root.iter() if node.get("class") == "bar"]
    assert [bar.get("height") for bar in bars] == ["150", "0"]
    assert [bar[0].text for bar in bars] == ["<a>: 3", "b: 0"]
    assert root.get("aria-label") == 't"<&'


def test_the_png_is_a_png_in_a_folder_of_its_own(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png([Histogram("t", ("1", "2"), (1, 2))], path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_png_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--png: .*a\.png cannot be written: "):
        save_png([Histogram("t", ("1",), (1,))], tmp_path / "file" / "a.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (9949, "9.9k"),
        (9960, "10k"),
        (999_499, "999k"),
        (999_500, "1.0M"),
        (2_100_000, "2.1M"),
    ],
)
def test_counts_are_short(count, text):
    assert short_count(count) == text
