"""What is decided about a medium before it is decoded, and what is read as was decided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from omnilit.data.media.files import fetch, media_error
from omnilit.data.media.images import planned_size, read_image, read_size
from omnilit.data.media.processor import Decoded, MediaProcessor
from omnilit.errors import DataError
from omnilit.types import Medium, Origin


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
    seen = read_size(medium, origin)
    size = planned_size(medium, origin, seen, media.config)
    plan: dict[str, Any] = {"seen": seen, "size": size}
    try:
        text = media.write_image(size)
    except ValueError as error:
        problem = f"the model's processor refuses it ({error})"
        raise media_error(origin, medium, problem, "change or remove it") from error
    return medium._replace(plan=json.dumps(plan), num_tokens=media.count_places(text)), text


def decode_media(media: Sequence[tuple[Medium, Origin]]) -> Decoded:
    """Read media as they were planned.

    Raises:
        DataError: One cannot be decoded.
    """
    decoded = Decoded([], [], [], [], [])
    for medium, origin in media:
        decoded.kinds.append(medium.kind)
        plan = json.loads(medium.plan)
        if list(read_size(medium, origin)) != plan["seen"]:
            raise changed(origin, medium)
        height, width = plan["size"]
        decoded.images.append(read_image(medium, origin, (height, width)))
    return decoded


def changed(origin: Origin, medium: Medium) -> DataError:
    """The error for a file that is no longer what it was when it was looked at."""
    return media_error(
        origin,
        medium,
        "it has changed since the data was prepared",
        "put it back, or set OMNILIT_CACHE to another folder so that the data is prepared anew",
    )
