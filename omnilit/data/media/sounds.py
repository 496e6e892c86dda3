"""Sounds: their length by the head of the file, and their samples at the rate of the model."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnilit.data.media.files import media_error, open_medium
from omnilit.data.media.videos import opened
from omnilit.types import Medium, Origin

SECOND: Final = 1_000_000  # of the whole file's time


def count_samples(medium: Medium, origin: Origin, rate: int) -> int:
    """Samples of a sound at `rate` a second.

    Raises:
        DataError: It has none, or cannot be read.
    """
    known = _ask_soundfile(medium, origin)
    frames, own = known if known is not None else _ask_container(medium, origin)
    if not frames or not own:
        raise media_error(origin, medium, "it has no sound", "mend or remove it")
    return math.ceil(frames * rate / own)


def count_track(medium: Medium, origin: Origin, rate: int) -> int:
    """Samples of a video's own sound at `rate` a second; 0 where it has none.

    Raises:
        DataError: The video cannot be read.
    """
    if medium.frames:
        return 0
    with opened(medium, origin) as (container, _):
        if not any(stream.type == "audio" for stream in container.streams):
            return 0
    frames, own = _ask_container(medium, origin)
    return math.ceil(frames * rate / own) if own else 0


def read_sound(
    medium: Medium, origin: Origin, rate: int, num_samples: int
) -> npt.NDArray[np.float32]:
    """A sound of one channel, float32 [num_samples]: what is missing at its end is silence.

    Raises:
        DataError: It cannot be decoded.
    """
    import av

    resampler = av.AudioResampler(format="fltp", rate=rate)
    pieces: list[Any] = []
    with opened(medium, origin, "audio") as (container, stream):
        for frame in container.decode(stream):
            frame.pts = None
            pieces += [_to_mono(piece) for piece in resampler.resample(frame)]
        pieces += [_to_mono(piece) for piece in resampler.resample(None)]
    if not pieces:
        raise media_error(origin, medium, "it has no sound", "mend or remove it")
    samples = np.concatenate(pieces).astype(np.float32)[:num_samples]
    return np.pad(samples, (0, num_samples - len(samples)))


def _to_mono(frame: Any) -> npt.NDArray[np.float32]:
    """The mean of all channels, [S]; ffmpeg's own mixture is louder than each of them."""
    return frame.to_ndarray().mean(axis=0)


def _ask_soundfile(medium: Medium, origin: Origin) -> tuple[int, int] | None:
    """Samples and their rate; None for a format that libsndfile does not know."""
    try:
        import soundfile
    except ImportError:
        return None
    with open_medium(medium, origin) as opened_file:
        file: Any = opened_file  # its stubs know less than it reads
        try:
            with soundfile.SoundFile(file) as found:
                return int(found.frames), int(found.samplerate)
        except soundfile.SoundFileError:
            return None


def _ask_container(medium: Medium, origin: Origin) -> tuple[int, int]:
    with opened(medium, origin, "audio") as (container, stream):
        rate = int(stream.rate or 0)
        if stream.duration is not None and stream.time_base:
            return round(stream.duration * stream.time_base * rate), rate
        return round((container.duration or 0) / SECOND * rate), rate
