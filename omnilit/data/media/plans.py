"""What is decided about a medium before it is decoded, and what is read as was decided."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from omnilit.data.media.files import fetch, media_error
from omnilit.data.media.images import planned_size, read_image, read_size
from omnilit.data.media.processor import Clip, Decoded, MediaProcessor
from omnilit.data.media.sounds import count_samples, count_track, read_sound
from omnilit.data.media.videos import plan_video, read_video
from omnilit.errors import DataError
from omnilit.types import Medium, Origin

SAMPLES: Final = "samples"  # of a sound, in its plan or in that of its video


def plan_medium(medium: Medium, origin: Origin, media: MediaProcessor) -> tuple[Medium, str]:
    """Look at the head of a medium and ask what the processor writes for it.

    Args:
        medium: As the record says it.
        origin: Of the record.
        media: Of the model.

    Returns:
        The medium with its plan and the number of its places, with its bytes where it was on
        the net; and its text.

    Raises:
        DataError: It cannot be read, or the processor takes none like it.
    """
    medium = fetch(medium, origin)
    plan, write = _PLANS[medium.kind](medium, origin, media)
    try:
        text = write()
    except ValueError as error:
        problem = f"the model's processor refuses it ({error})"
        raise media_error(origin, medium, problem, "change or remove it") from error
    return medium._replace(plan=json.dumps(plan), num_tokens=media.count_places(text)), text


def decode_media(media: Sequence[tuple[Medium, Origin]], processor: MediaProcessor) -> Decoded:
    """Read media as they were planned.

    Args:
        media: In order, each with the origin of its record.
        processor: Of the model.

    Raises:
        DataError: One cannot be decoded, or is not what it was.
    """
    decoded = Decoded([], [], [], [], [], [])
    for medium, origin in media:
        decoded.kinds.append(medium.kind)
        plan = json.loads(medium.plan)
        if medium.kind == "image":
            if list(read_size(medium, origin)) != plan["seen"]:
                raise changed(origin, medium)
            height, width = plan["size"]
            decoded.images.append(read_image(medium, origin, (height, width)))
        elif medium.kind == "video":
            clip = Clip.of_plan(plan)
            decoded.clips.append(clip)
            decoded.videos.append(read_video(medium, origin, clip))
        if plan.get(SAMPLES):
            decoded.sources.append(len(decoded.clips) - 1 if medium.kind == "video" else None)
            sound = read_sound(medium, origin, processor.sample_rate, plan[SAMPLES])
            decoded.sounds.append(sound)
    return decoded


def has_track(medium: Medium) -> bool:
    """Whether a planned video is taken with its sound."""
    return medium.kind == "video" and bool(json.loads(medium.plan).get(SAMPLES))


def _plan_image(medium: Medium, origin: Origin, media: MediaProcessor) -> Planned:
    seen = read_size(medium, origin)
    size = planned_size(medium, origin, seen, media.config, media.bounds.get("image"))
    return {"seen": seen, "size": size}, lambda: media.write_image(size)


def _plan_video(medium: Medium, origin: Origin, media: MediaProcessor) -> Planned:
    clip = plan_video(medium, origin, media.config, media.least_frames, media.bounds.get("video"))
    if not media.config.use_audio_in_video:
        return clip._asdict(), lambda: media.write_video(clip)
    number = count_track(medium, origin, media.sample_rate)
    return {**clip._asdict(), SAMPLES: number}, lambda: media.write_video(clip, number)


def _plan_sound(medium: Medium, origin: Origin, media: MediaProcessor) -> Planned:
    number = count_samples(medium, origin, media.sample_rate)
    return {SAMPLES: number}, lambda: media.write_sound(number)


def changed(origin: Origin, medium: Medium) -> DataError:
    """The error for a file that is no longer what it was when it was looked at."""
    return media_error(
        origin,
        medium,
        "it has changed since the data was prepared",
        "put it back, or set OMNILIT_CACHE to another folder so that the data is prepared anew",
    )


# What is known of a medium, and who writes its text
Planned = tuple[dict[str, Any], Callable[[], str]]
_PLANS: Final[Mapping[str, Callable[[Medium, Origin, MediaProcessor], Planned]]] = MappingProxyType(
    {"image": _plan_image, "video": _plan_video, "audio": _plan_sound}
)
