"""Videos: which frames are taken, by the head of the file, and these frames decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from omnilit.config.media import DEFAULT_FPS, MediaConfig
from omnilit.data.media.bounds import PixelBounds, fit_bounds
from omnilit.data.media.files import media_error, open_medium
from omnilit.data.media.images import read_image, read_size
from omnilit.data.media.processor import Clip
from omnilit.data.media.torchcodec_frames import find_torchcodec
from omnilit.errors import ConfigError, DataError
from omnilit.types import Medium, Origin

MIN_BOUND: Final = 1.05  # of a share of all pixels, in `video_min_pixels`
LATE: Final = 0.25  # of a frame's time: how much later a frame may stand than it should


def plan_video(
    medium: Medium,
    origin: Origin,
    config: MediaConfig,
    least: int,
    own: PixelBounds | None = None,
) -> Clip:
    """The frames that are taken of a video, evenly from its first to its last.

    Args:
        medium: The video, or its frames.
        origin: Of its record.
        config: Says how many, and of which size.
        least: Frames that the model needs; the last one is taken again where there are fewer.
        own: The processor's bounds.

    Raises:
        DataError: It has no frames, or cannot be read.
    """
    if medium.frames:
        size, fps, total = _look_at_frames(medium, origin)
    else:
        size, fps, total = _look(medium, origin)
    if not total:
        raise media_error(origin, medium, "it has no frames", "mend or remove it")
    number = config.count_frames(total, fps)
    indices = np.linspace(0, total - 1, min(number, total)).round().astype(int).tolist()
    indices += [indices[-1]] * (max(number, least) - len(indices))
    return Clip(_fit_frame(size, len(indices), config, own), tuple(indices), fps, total)


def read_video(medium: Medium, origin: Origin, clip: Clip) -> Tensor:
    """The frames of a clip, uint8 [F, 3, H, W].

    Raises:
        DataError: They cannot be decoded.
    """
    if medium.frames:
        images = [read_image(medium.frames[i], origin, clip.size) for i in clip.indices]
        return _stack([np.asarray(image) for image in images])
    decode = find_torchcodec()
    if decode is None:
        return _stack(_decode(medium, origin, clip))
    with open_medium(medium, origin) as file:
        try:
            return decode(file, _times(clip), clip.size)
        except (RuntimeError, ValueError, OSError) as error:
            raise media_error(
                origin, medium, f"it cannot be decoded ({error})", "mend or remove it"
            ) from error


def _times(clip: Clip) -> list[float]:
    """Seconds from the first frame until the wanted ones are due, and a little more."""
    return [(index + 1 - LATE) / clip.fps for index in clip.indices]


def _fit_frame(
    size: tuple[int, int], number: int, config: MediaConfig, own: PixelBounds | None
) -> tuple[int, int]:
    least, most = config.video_min_pixels, config.video_max_pixels
    bound: float | None = most
    if config.video_total_pixels is not None:
        share = config.video_total_pixels / number * (config.frame_factor or 1)
        bound = max(min(share, most or math.inf), MIN_BOUND * (least or 0))
    return fit_bounds(
        size, factor=config.scale_factor, least=least, most=bound, own=own, frames=number
    )


def _look_at_frames(medium: Medium, origin: Origin) -> tuple[tuple[int, int], float, int]:
    sizes = {read_size(frame, origin) for frame in medium.frames}
    if len(sizes) > 1:
        problem = f"its frames have {len(sizes)} sizes"
        raise media_error(origin, medium, problem, "bring them to one")
    return sizes.pop(), medium.fps or DEFAULT_FPS, len(medium.frames)


def _look(medium: Medium, origin: Origin) -> tuple[tuple[int, int], float, int]:
    """Size, frames a second and number of frames, without decoding."""
    with opened(medium, origin) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate or not stream.height or not stream.width:
            raise media_error(origin, medium, "it has no frames", "mend or remove it")
        total = stream.frames or _count(container, stream)
        return (int(stream.height), int(stream.width)), float(rate), int(total)


def _count(container: Any, stream: Any) -> int:
    """Frames of a file whose head does not say it: its packets are read, not decoded."""
    return sum(packet.pts is not None and bool(packet.size) for packet in container.demux(stream))


def _decode(medium: Medium, origin: Origin, clip: Clip) -> list[Any]:
    """The wanted frames by their times, so that a text may name these times."""
    height, width = clip.size
    found: list[Any] = []
    times = _times(clip)
    with opened(medium, origin) as (container, stream):
        base = stream.time_base
        start: float | None = None
        last: Any = None
        for frame in container.decode(stream):
            time = float((frame.pts or 0) * base)
            start = time if start is None else start
            # a frame is shown until the next one is due
            while len(found) < len(times) and last is not None:
                if time < start + times[len(found)]:
                    break
                found.append(_to_pixels(last, height, width))
            last = frame
            if len(found) == len(times):
                break
        if last is None:
            raise media_error(origin, medium, "it has no frames", "mend or remove it")
        while len(found) < len(times):
            found.append(_to_pixels(last, height, width))
    return found


def _to_pixels(frame: Any, height: int, width: int) -> Any:
    return frame.to_ndarray(width=width, height=height, format="rgb24")


def _stack(frames: list[Any]) -> Tensor:
    pixels = np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels)


@contextmanager
def opened(medium: Medium, origin: Origin, kind: str = "video") -> Iterator[tuple[Any, Any]]:
    """A file and its first stream of a kind, for PyAV; what goes wrong within is told.

    Raises:
        DataError: It is no such file, has no such stream, or is damaged.
        ConfigError: PyAV is not installed.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise ConfigError(
            key="data.train_path",
            problem=f"{medium.path or 'a record'}: {kind} needs the package av",
            fix="pip install omnilit[vlm]",
        ) from error
    with open_medium(medium, origin) as file:
        try:
            with av.open(file) as container:
                stream = next((s for s in container.streams if s.type == kind), None)
                if stream is None:
                    raise media_error(origin, medium, f"it has no {kind}", "mend or remove it")
                yield container, stream
        except DataError:
            raise
        except (FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
            raise media_error(
                origin, medium, f"it cannot be decoded ({error})", "mend or remove it"
            ) from error
