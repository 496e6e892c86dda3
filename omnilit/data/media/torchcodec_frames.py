"""Frames of videos by torchcodec, where it is installed: it seeks to them, PyAV decodes up to them.

It is compiled for one release of torch and looks for an ffmpeg of the system, so it may be there
and not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import IO, Any

from torch import Tensor

from omnilit.logging import get_logger

log = get_logger(__name__)
Decode = Callable[[IO[bytes], Sequence[float], tuple[int, int]], Tensor]
NO_TIME_S = 1e-6  # before the end, at which nothing is shown any more


@cache
def find_torchcodec() -> Decode | None:
    """What decodes frames; None where torchcodec is not installed, or does not run here.

    The choice is logged, once a process.
    """
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
        from torchcodec.transforms import Resize  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:  # no ffmpeg, or another release of torch
        if getattr(error, "name", None) != "torchcodec":
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            log.warning("PyAV decodes videos: torchcodec is installed and does not run (%s)", first)
        return None
    log.info("torchcodec decodes videos")

    def decode(file: IO[bytes], times_s: Sequence[float], size: tuple[int, int]) -> Tensor:
        decoder: Any = VideoDecoder(file, transforms=[Resize(size)])
        start, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        shown = [min(start + time, end - NO_TIME_S) for time in times_s]
        return decoder.get_frames_played_at(shown).data

    return decode
