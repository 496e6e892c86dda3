"""Pictures of media for people."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from omnilit.data.media.pictures import (
    BACK,
    GAP,
    INK,
    WAVE,
    draw_media,
    encode_picture,
    find_factor,
)
from omnilit.data.media.places import show_places
from omnilit.types import IGNORE, Medium, Origin, Sample
from tests.helpers.processors import media_processor, write_image

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200))


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin("train", str(tmp_path / "data.jsonl"), 1)


def test_an_image_keeps_its_shape_and_a_small_one_its_pixels(tmp_path, origin):
    write_image(tmp_path / "large.png", 400, 800)
    write_image(tmp_path / "small.png", 8, 6)
    media = (Medium("image", "large.png", num_tokens=1200), Medium("image", "small.png"))
    large, small = draw_media(media, origin)
    assert large.caption == "image, 800 x 400, 1,200 tokens"
    assert large.image is not None
    assert large.image.size == (160, 80)
    assert small.image is not None
    with Image.open(tmp_path / "small.png") as own:
        assert np.array_equal(np.asarray(small.image), np.asarray(own))


def test_of_a_video_four_frames_stand_in_a_row(tmp_path, origin):
    with av.open(str(tmp_path / "v.mkv"), "w") as film:
        stream = film.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "bgr0"
        for colour in (c for c in COLOURS for _ in range(2)):  # two seconds: four are taken
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 16), colour))
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    (picture,) = draw_media((Medium("video", "v.mkv"),), origin)
    assert picture.caption == "video, 10 frames at 5 a second, 4 taken"
    assert picture.image is not None
    assert picture.image.size == (4 * 32 + 3 * GAP, 16)
    middles = [picture.image.getpixel((16 + n * (32 + GAP), 8)) for n in range(4)]
    assert middles == [COLOURS[index // 2] for index in (0, 3, 6, 9)]
    assert picture.image.getpixel((32 + GAP // 2, 8)) == BACK


def test_a_sound_is_as_high_as_it_is_loud(tmp_path, origin):
    wave = np.repeat([0.9, 0.0], 8000) * np.sin(np.arange(16_000) / 5)
    soundfile.write(tmp_path / "s.wav", wave, 16_000)
    (picture,) = draw_media((Medium("audio", "s.wav"),), origin)
    assert picture.caption == "sound, 1.0 s"
    assert picture.image is not None
    ink = (np.asarray(picture.image) == INK).all(axis=-1).sum(axis=0)
    assert len(ink) == WAVE[0]
    assert ink[10 : WAVE[0] // 2 - 10].min() > 5 * ink[WAVE[0] // 2 + 10 :].max()


def test_what_cannot_be_read_is_told_and_of_many_the_first_are_drawn(tmp_path, origin):
    write_image(tmp_path / "a.png", 8, 8)
    media = (Medium("image", "gone.png"), *[Medium("image", "a.png")] * 9)
    found = draw_media(media, origin)
    assert "gone.png: cannot be read" in found[0].caption
    assert [one.image is None for one in found] == [True, *[False] * 5, True]
    assert found[-1].caption == "and 4 more"


def test_a_photograph_is_smaller_as_jpeg_and_a_drawing_as_png():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image, name in ((Image.fromarray(noise), "jpeg"), (Image.new("RGB", (64, 64)), "png")):
        data, ending = encode_picture(image)
        assert ending == name
        with Image.open(io.BytesIO(data)) as read:
            assert (read.format, read.size) == (name.upper(), (64, 64))


def test_of_each_medium_the_first_place_is_shown():
    media = media_processor()
    place = media.places["image"][0]
    ids = np.asarray([1, place, place, place, 2, place, 3], np.int32)
    labels = np.where(ids == 3, ids, np.int32(IGNORE))
    one, two, three = (Medium("image", num_tokens=number) for number in (1, 2, 3))
    shown = show_places(Sample(ids, labels, Origin("", "", 1), media=(three, one)), media)
    assert shown.input_ids.tolist() == [1, place, 2, place, 3]
    assert shown.labels.tolist() == [IGNORE] * 4 + [3]
    shown = show_places(Sample(ids, labels, Origin("", "", 1), media=(two, one, one)), media)
    assert shown.input_ids.tolist() == [1, place, place, 2, place, 3]


@pytest.mark.parametrize(
    ("size", "factor"), [((32, 32), 3), ((140, 32), 3), ((300, 2), 1), ((160, 90), 1), ((1, 97), 1)]
)
def test_small_pictures_are_enlarged_as_far_as_there_is_room(size, factor):
    assert find_factor(Image.new("RGB", size)) == factor
