"""Small pictures of media, for people: an image, some frames of a video, the wave of a sound."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from omnilit.config.media import MediaConfig
from omnilit.data.media.images import read_image, read_size
from omnilit.data.media.processor import Clip
from omnilit.data.media.sounds import count_samples, read_sound
from omnilit.data.media.videos import plan_video, read_video
from omnilit.errors import OmniError
from omnilit.types import Medium, Origin

SIDE: Final = 160  # pixels of a picture's longer side
MIN_HEIGHT: Final = 96  # to which smaller pictures are enlarged where they are shown,
MAX_WIDTH: Final = 480  # but no wider than this
NUM_FRAMES: Final = 4
GAP: Final = 4  # pixels between frames
WAVE: Final = (240, 60)  # width and height
WAVE_RATE: Final = 8_000  # samples a second that a wave is drawn from
BACK: Final = (255, 255, 255)
INK: Final = (47, 111, 180)
JPEG_QUALITY: Final = 80
SMALL: Final = 4_096  # bytes that a picture may always have
MAX_PICTURES: Final = 6  # of one sample


class Picture(NamedTuple):
    """A medium as it is shown.

    Args:
        caption: What it is, and how large.
        image: At most `SIDE` pixels long, a row of frames more; None where it cannot be read.
    """

    caption: str
    image: Image.Image | None = None


def draw_media(media: Sequence[Medium], origin: Origin) -> tuple[Picture, ...]:
    """Pictures of the first media of a sample; of the others their number.

    One that cannot be read has the reason as its caption.

    Args:
        media: In order, planned or not.
        origin: Of their record.
    """
    drawn = list(_draw_each(media[:MAX_PICTURES], origin))
    if more := len(media) - len(drawn):
        drawn.append(Picture(f"and {more:,} more"))
    return tuple(drawn)


def find_factor(image: Image.Image) -> int:
    """By how much a picture is enlarged, so that it can be seen: 1 but for small ones."""
    return max(1, min(MIN_HEIGHT // image.height, MAX_WIDTH // image.width))


def encode_picture(image: Image.Image) -> tuple[bytes, str]:
    """A picture as a file, and the ending of its name: PNG, or JPEG for what is large in that."""
    data = _save(image, "png")
    if len(data) <= SMALL or len(coarse := _save(image, "jpeg")) >= len(data):
        return data, "png"
    return coarse, "jpeg"


def _save(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return buffer.getvalue()


def _draw_each(media: Sequence[Medium], origin: Origin) -> Iterator[Picture]:
    for medium in media:
        try:
            picture = _DRAW[medium.kind](medium, origin)
        except OmniError as error:  # it is gone, or a package is
            yield Picture(str(error))
            continue
        places = f", {medium.num_tokens:,} tokens" if medium.num_tokens else ""
        yield picture._replace(caption=f"{picture.caption}{places}")


def _draw_image(medium: Medium, origin: Origin) -> Picture:
    height, width = read_size(medium, origin)
    image = read_image(medium, origin, _fit((height, width)))
    return Picture(f"image, {width} x {height}", image)


def _draw_video(medium: Medium, origin: Origin) -> Picture:
    if medium.plan:  # as its text says
        clip = Clip.of_plan(json.loads(medium.plan))
    else:
        clip = plan_video(medium, origin, MediaConfig(), 1)
    chosen = np.linspace(0, len(clip.indices) - 1, min(NUM_FRAMES, len(clip.indices))).round()
    indices = tuple(clip.indices[int(i)] for i in chosen)
    small = clip._replace(size=_fit(clip.size), indices=indices)
    frames = read_video(medium, origin, small).permute(0, 2, 3, 1).numpy()
    height, width = small.size
    row = Image.new("RGB", (len(frames) * (width + GAP) - GAP, height), BACK)
    for place, frame in enumerate(frames):
        row.paste(Image.fromarray(frame), (place * (width + GAP), 0))
    taken = len(set(clip.indices))
    return Picture(f"video, {clip.total:,} frames at {clip.fps:g} a second, {taken} taken", row)


def _draw_sound(medium: Medium, origin: Origin) -> Picture:
    number = count_samples(medium, origin, WAVE_RATE)
    samples = read_sound(medium, origin, WAVE_RATE, number)
    width, height = WAVE
    wave = Image.new("RGB", WAVE, BACK)
    draw, middle = ImageDraw.Draw(wave), (height - 1) / 2
    for x, part in enumerate(np.array_split(samples, width)):
        low, high = (part.min(), part.max()) if len(part) else (0.0, 0.0)
        ends = [round(middle - middle * float(np.clip(y, -1, 1))) for y in (high, low)]
        draw.line([(x, ends[0]), (x, ends[1])], INK)
    return Picture(f"sound, {number / WAVE_RATE:.1f} s", wave)


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    """A height and width within `SIDE`, of the same shape; small ones as they are."""
    share = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


_DRAW: Final[Mapping[str, Callable[[Medium, Origin], Picture]]] = MappingProxyType(
    {"image": _draw_image, "video": _draw_video, "audio": _draw_sound}
)
