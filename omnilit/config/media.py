"""`mm_configs`, of `data` and of `infer`: how images, videos and sounds are prepared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from omnilit.errors import ConfigError, Problem, suggest

KEY: Final = "data.mm_configs"
INFER_KEY: Final = "infer.mm_configs"
NUMBERS: Final = ("max_ratio", "fps")
FLAGS: Final = ("use_audio_in_video",)
GENERATION: Final = ("generation_ratio", "cfg_ratio")  # of models that make images
DEFAULT_FPS: Final = 2.0


@dataclass(frozen=True, slots=True)
class MediaConfig:
    """What becomes of media before the model's own processor sees them.

    Args:
        image_min_pixels: Smaller images are enlarged to as many; None for no bound.
        image_max_pixels: Larger ones are reduced; likewise.
        scale_factor: Both sides of images and frames become multiples of it.
        max_ratio: An image whose long side is more than this many short ones is refused.
        max_image_nums: Images of a record; those behind are left out, with their places.
        fps: Frames that are taken of a second of video; None stands for 2, or for `frames`.
        min_frames: At least so many of a video.
        max_frames: At most so many.
        frames: Just so many, in place of `fps`.
        frame_factor: Their number is a multiple of this ...
        frame_factor_remainder: ... and this more, which suits causal video encoders.
        video_min_pixels: As of images, for each frame.
        video_max_pixels: Likewise.
        video_total_pixels: Of all frames of a video together, times `frame_factor`.
        use_audio_in_video: Take the sound of a video, too, where it has one; of omni models.
        sample_rate: Samples a second that sounds are brought to.
    """

    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    scale_factor: int | None = None
    max_ratio: float | None = None
    max_image_nums: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    frames: int | None = None
    frame_factor: int | None = None
    frame_factor_remainder: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    video_total_pixels: int | None = None
    use_audio_in_video: bool = False
    sample_rate: int = 16_000

    def count_frames(self, total: int, fps: float) -> int:
        """Frames that are taken of a video of `total` frames, `fps` a second; at least one."""
        if self.frames is not None:
            return self.frames
        low, high = self.frame_bounds()
        # a hair more, so that 1.9999999 of a rounded rate is 2
        wanted = math.floor(total / fps * (self.fps or DEFAULT_FPS) + 1e-6)
        wanted = min(wanted, total)
        wanted = max(low or 1, min(wanted, high or wanted))
        return self._align(wanted)

    def frame_bounds(self) -> tuple[int | None, int | None]:
        """`min_frames` and `max_frames` as numbers that there can be: one rounded up, one down."""
        low = None if self.min_frames is None else self._align(self.min_frames, is_up=True)
        high = None if self.max_frames is None else self._align(self.max_frames)
        return low, high

    def _align(self, number: int, *, is_up: bool = False) -> int:
        """The next number that `frame_factor` allows, below or above, and above 0."""
        factor, rest = self.frame_factor or 1, self.frame_factor_remainder or 0
        steps = (number - rest) / factor
        aligned = (math.ceil(steps) if is_up else math.floor(steps)) * factor + rest
        return aligned if aligned > 0 else rest or factor


def read_media_config(values: Mapping[str, Any] | None, key: str = KEY) -> MediaConfig:
    """The settings of the field `key`.

    Raises:
        ConfigError: Everything that is wrong with them.
    """
    problems = check_media_config(values, key)
    if problems:
        raise ConfigError.of(problems)
    return MediaConfig(**(values or {}))


def check_media_config(values: Mapping[str, Any] | None, key: str = KEY) -> list[Problem]:
    """What is wrong with the field `key`: unknown names, types, ranges, what excludes what."""
    given = dict(values or {})
    known = [field.name for field in fields(MediaConfig)]
    problems = [p for name, value in given.items() if (p := _check_one(name, value, known))]
    if not problems:
        problems = _check_together(MediaConfig(**given))
    return [replace(problem, key=f"{key}.{problem.key}") for problem in problems]


def fit_size(
    height: int,
    width: int,
    *,
    factor: int | None = None,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
) -> tuple[int, int]:
    """A size near another one: sides multiples of `factor`, pixels within bounds.

    No side is less than one `factor`, so the largest number of pixels gives way where an image
    is very long. Where both bounds cannot be met the upper one is. The shape is kept but for the
    rounding.
    """
    unit = factor or 1
    new_height = max(unit, round(height / unit) * unit)
    new_width = max(unit, round(width / unit) * unit)
    if max_pixels is not None and new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(unit, math.floor(height / scale / unit) * unit)
        new_width = max(unit, math.floor(width / scale / unit) * unit)
    elif min_pixels is not None and new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        for align in (math.ceil, math.floor):
            larger = [max(unit, align(side * scale / unit) * unit) for side in (height, width)]
            if max_pixels is None or math.prod(larger) <= max_pixels:
                new_height, new_width = larger
                break
    return new_height, new_width


def _check_one(name: str, value: object, known: list[str]) -> Problem | None:
    if name in GENERATION:
        problem = "it belongs to models that make images, which are not available yet"
        return Problem(name, problem, "leave it out")
    if name not in known:
        fix = f"use one of {', '.join(known)}"
        return Problem(name, f"there is no such setting.{suggest(str(name), known)}", fix)
    is_flag = isinstance(value, bool)
    if name in FLAGS:
        return None if is_flag else Problem(name, f"{value!r} is not true or false", "write one")
    if value is None and name != "sample_rate":
        return None
    kinds: tuple[type, ...] = (int, float) if name in NUMBERS else (int,)
    least = 0 if name == "frame_factor_remainder" else 1
    what = "a number above 0" if name in NUMBERS else f"a whole number of at least {least}"
    if not is_flag and isinstance(value, kinds) and _is_in_range(name, value, least):
        return None
    return Problem(name, f"{value!r} is not {what}", f"write {what}")


def _is_in_range(name: str, value: Any, least: int) -> bool:
    if name == "max_ratio":
        return 1 <= value < math.inf
    return 0 < value < math.inf if name in NUMBERS else value >= least


def _check_together(config: MediaConfig) -> list[Problem]:
    found: list[tuple[str, str, str]] = []
    for low, high in (
        ("image_min_pixels", "image_max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
        ("min_frames", "max_frames"),
    ):
        least, most = getattr(config, low), getattr(config, high)
        if least is not None and most is not None and least > most:
            found.append((low, f"{least} is more than {high}: {most}", f"give at most {most}"))
    found += _check_factor(config)
    found += _check_count(config)
    if not found:
        least, most = config.frame_bounds()
        if least is not None and most is not None and least > most:
            problem = "no number of frames between min_frames and this fits frame_factor"
            found.append(("max_frames", problem, "raise it"))
    return [Problem(name, problem, fix) for name, problem, fix in found]


def _check_factor(config: MediaConfig) -> list[tuple[str, str, str]]:
    factor, rest = config.frame_factor, config.frame_factor_remainder
    name = "frame_factor_remainder"
    if rest and factor is None:
        return [(name, "there is no frame_factor that it remains of", "give one")]
    if rest is not None and factor is not None and rest >= factor:
        return [(name, f"{rest} is not below frame_factor: {factor}", "lower it")]
    return []


def _check_count(config: MediaConfig) -> list[tuple[str, str, str]]:
    """`frames` says all that there is to say, and fits the factor."""
    if config.frames is None:
        return []
    reason = f"frames: {config.frames} says how many there are"
    others = ("fps", "min_frames", "max_frames")
    found = [(name, reason, "leave one out") for name in others if getattr(config, name)]
    factor, rest = config.frame_factor, config.frame_factor_remainder or 0
    if factor is not None and config.frames % factor != rest:
        problem = f"{config.frames} is not a multiple of frame_factor: {factor} and {rest} more"
        found.append(("frames", problem, "choose one that is"))
    return found
