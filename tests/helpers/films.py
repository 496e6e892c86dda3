"""Films with sounds, and tones."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt

RATE: Final = 16_000
FPS: Final = 8
SIDE: Final = 64


def tone(seconds: float, frequency: float = 440.0) -> npt.NDArray[np.int16]:
    times = np.arange(int(RATE * seconds)) / RATE
    return (12_000 * np.sin(2 * np.pi * frequency * times)).astype(np.int16)


def write_film(
    file: Path,
    number: int,
    sound: npt.NDArray[np.int16] | None = None,
    *,
    channels: int = 1,
    fps: int = FPS,
    codec: str = "ffv1",
) -> str:
    """Frames, k of the grey 4 k, and a sound without loss; its name."""
    with av.open(str(file), "w") as container:
        video: Any = container.add_stream(codec, rate=fps)
        video.width = video.height = SIDE
        video.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        layout = "stereo" if channels == 2 else "mono"
        audio: Any = None
        if sound is not None:
            audio = container.add_stream("pcm_s16le", rate=RATE, layout=layout)
        container.start_encoding()
        for k in range(number):
            grey = np.full((SIDE, SIDE, 3), 4 * k % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, fps)
            container.mux(video.encode(frame))
        if number:
            container.mux(video.encode())
        if audio is not None and sound is not None:
            samples = np.repeat(sound[:, None], channels, axis=1).reshape(1, -1)
            heard = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
            heard.rate, heard.pts = RATE, 0
            container.mux(audio.encode(heard))
            container.mux(audio.encode())
    return file.name
