"""`data.mm_configs`: which keys there are, and what they say."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnilit.config.media import MediaConfig, fit_size, read_media_config
from omnilit.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fpz": 2}, r"mm_configs\.fpz: there is no such setting\. Did you mean 'fps'"),
        ({"fps": 0}, r"mm_configs\.fps: 0 is not a number above 0"),
        ({"fps": "2"}, "'2' is not a number above 0"),
        ({"image_max_pixels": 2.5}, "2.5 is not a whole number of at least 1"),
        ({"scale_factor": True}, "True is not a whole number"),
        ({"max_ratio": 0.5}, "0.5 is not a number above 0"),
        ({"use_audio_in_video": 1}, "1 is not true or false"),
        ({"sample_rate": None}, "None is not a whole number"),
        ({"cfg_ratio": 0.1}, "belongs to models that make images"),
        ({"image_min_pixels": 9, "image_max_pixels": 8}, "9 is more than image_max_pixels: 8"),
        ({"video_min_pixels": 9, "video_max_pixels": 8}, "9 is more than video_max_pixels: 8"),
        ({"min_frames": 9, "max_frames": 8}, "9 is more than max_frames: 8"),
        ({"min_frames": 5, "max_frames": 7, "frame_factor": 4}, "no number of frames between"),
        ({"frame_factor_remainder": 1}, "no frame_factor that it remains of"),
        ({"frame_factor": 2, "frame_factor_remainder": 2}, "2 is not below frame_factor: 2"),
        ({"frames": 3, "fps": 1.0}, "frames: 3 says how many there are"),
        ({"frames": 3, "frame_factor": 2}, "3 is not a multiple of frame_factor: 2"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        read_media_config(values)


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read_media_config({"fpz": 2, "fps": -1, "max_frames": 0})
    assert len(caught.value.problems) == 3
    assert read_media_config(None) == read_media_config({}) == MediaConfig()


@pytest.mark.parametrize(
    ("settings", "total", "fps", "count"),
    [
        ({}, 100, 25.0, 8),
        ({"fps": 1.0}, 100, 25.0, 4),
        ({"fps": 50.0}, 100, 25.0, 100),  # there are no more
        ({"fps": 1.0, "min_frames": 6}, 100, 25.0, 6),
        ({"fps": 1.0, "min_frames": 5, "frame_factor": 2}, 100, 25.0, 6),
        ({"max_frames": 5, "frame_factor": 2}, 100, 25.0, 4),
        ({"frame_factor": 4, "frame_factor_remainder": 1}, 100, 25.0, 5),
        ({"frame_factor": 4}, 1, 25.0, 4),  # never none
        ({"frame_factor": 4, "frame_factor_remainder": 1}, 1, 25.0, 1),
        ({"frames": 7}, 100, 25.0, 7),
        ({}, 1, 30.0, 1),
    ],
)
def test_frames_are_counted(settings: dict[str, Any], total: int, fps: float, count: int):
    assert read_media_config(settings).count_frames(total, fps) == count


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([None, 14, 28, 32]),
    st.sampled_from([None, 3136]),
    st.sampled_from([None, 200_704]),
)
def test_sizes_are_multiples_within_bounds(height, width, factor, least, most):
    new = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=most)
    unit = factor or 1
    assert all(side > 0 and side % unit == 0 for side in new)
    if least is not None:
        assert math.prod(new) >= least or (most is not None and math.prod(new) > most)
    if most is not None and min(new) > unit:
        assert math.prod(new) <= most
    if factor is least is most is None:
        assert new == (height, width)


@pytest.mark.parametrize(
    ("size", "bound", "fitted"),
    [
        ((20, 20), 50_000, (196, 196)),
        ((13, 400), 16_384, (28, 392)),
        ((20, 20), 50_176, (224, 224)),
    ],
)
def test_where_both_bounds_cannot_be_met_the_upper_one_is(size, bound, fitted):
    assert fit_size(*size, factor=28, min_pixels=bound, max_pixels=bound) == fitted


def test_a_side_is_never_rounded_to_nothing():
    height, width = fit_size(10, 8000, factor=28, max_pixels=7840)
    assert height == 28
    assert width % 28 == 0
