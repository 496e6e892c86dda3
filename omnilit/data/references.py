"""What records say about images, videos and sounds: where each is, and its place in the text."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from omnilit.data.refusals import kind_of, refuse
from omnilit.types import MODALITIES, Medium, Record

# Characters that no text has (Unicode sets them apart for use within programs): each stands for
# one medium in the text of a turn
MARKS: Final[Mapping[str, str]] = MappingProxyType(
    {"image": "\ufdd0", "video": "\ufdd1", "audio": "\ufdd2"}
)
KINDS: Final[Mapping[str, str]] = MappingProxyType({mark: kind for kind, mark in MARKS.items()})
MARK: Final = re.compile("[" + "".join(MARKS.values()) + "]")
# Types of a part of a message, with the kind of medium that each is
PARTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{kind: kind for kind in MODALITIES},
        **{f"{kind}_url": kind for kind in MODALITIES},
        "input_image": "image",
        "input_audio": "audio",
    }
)
PLACES: Final = ("path", "url", "base64", "bytes", "data")  # beside the part's own type
BASE64: Final = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
MIN_BASE64: Final = 256  # characters; no path is so long without a dot


def read_part(record: Record, part: object, what: str) -> Medium:
    """The medium that a part of a message is.

    A part is `{"type": "image", "image": ...}` (or `path`, `url`, `base64`, `bytes`), or as
    OpenAI writes it, `{"type": "image_url", "image_url": {"url": ...}}`; videos and sounds alike.
    A part that names no place takes the next of the record's column.

    Raises:
        DataError: It is none of these.
    """
    name = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    kind = PARTS.get(str(name))
    if not isinstance(part, Mapping) or kind is None:
        known = ", ".join(("text", *MODALITIES))
        raise refuse(record, f"{what} has a part of type {name!r}", f"use one of {known}")
    names = (str(name), kind, *PLACES)
    value = next((part[name] for name in names if part.get(name) is not None), None)
    medium = Medium(kind)
    if value is None:
        return medium  # its place, to be filled from a column
    fps = part.get("fps", part.get("sample_fps"))
    return read_value(record, value, medium.kind, f"{what}: its {medium.kind}", fps=fps)


def read_value(
    record: Record, value: object, kind: str, what: str, *, fps: object = None
) -> Medium:
    """The medium of a value: a path, an address, base64, bytes, an object with one of these.

    Args:
        record: For messages.
        value: What stands in the record; of a video also a list of images.
        kind: A key of `MODALITIES`.
        what: How to call it in messages.
        fps: Images of a video that make a second.

    Raises:
        DataError: It is none of these.
    """
    if isinstance(value, Mapping):
        names = ("bytes", *(name for name in (kind, *PLACES) if name != "bytes"))
        inner = next((value[name] for name in names if value.get(name) is not None), None)
        if inner is not None:
            return read_value(record, inner, kind, what, fps=value.get("fps", fps))
    if isinstance(value, bytes | bytearray | memoryview):
        return Medium(kind, data=bytes(value))
    if isinstance(value, str) and value.strip():
        return _read_text(record, value.strip(), kind, what)
    if kind == "video" and isinstance(value, list) and value:
        frames = tuple(
            read_value(record, one, "image", f"{what}, image {number}")
            for number, one in enumerate(value, start=1)
        )
        return Medium(kind, frames=frames, fps=_read_fps(record, fps, what))
    raise refuse(
        record,
        f"{what} is {kind_of(value)}{' without a place' if isinstance(value, Mapping) else ''}",
        "give a path, an address, base64 or bytes",
    )


def is_place(medium: Medium) -> bool:
    """Whether a medium is none yet, but the place of one."""
    return not medium.path and medium.data is None and not medium.frames


def place_media(record: Record, content: str, columns: Mapping[str, list[Medium]]) -> str:
    """A text with its `<image>`, `<video>` and `<audio>` as marks, for the kinds of `columns`.

    Raises:
        DataError: The text holds a mark of its own.
    """
    if MARK.search(content):
        raise refuse(
            record,
            f"a message holds the character {MARK.search(content)!r}, which is none of text",
            "leave it out",
        )
    for kind in columns:
        content = content.replace(f"<{kind}>", MARKS[kind])
    return content


def read_columns(record: Record) -> dict[str, list[Medium]]:
    """The media of the fields `images`, `videos` and `audios` (or `image` ...), by kind.

    Only of fields that are there: a text without them may say `<image>` and mean just that.

    Raises:
        DataError: One of them is nothing that can be read.
    """
    found: dict[str, list[Medium]] = {}
    for kind in MODALITIES:
        name = next(
            (name for name in (f"{kind}s", kind) if record.fields.get(name) is not None), None
        )
        if name is None:
            continue
        values: Any = record.fields[name]
        if not isinstance(values, list):
            values = [values]
        found[kind] = [
            read_value(record, value, kind, f"{name}[{index}]", fps=record.fields.get("fps"))
            for index, value in enumerate(values)
        ]
    return found


def is_address(path: str) -> bool:
    """Whether a medium is somewhere on the net."""
    return path.startswith(("http://", "https://"))


def _read_text(record: Record, value: str, kind: str, what: str) -> Medium:
    if value.startswith("data:"):
        value = value.partition(",")[2]
    elif is_address(value) or not (len(value) >= MIN_BASE64 and BASE64.fullmatch(value)):
        return Medium(kind, path=value.removeprefix("file://"))
    try:
        return Medium(kind, data=base64.b64decode(value, validate=False))
    except (binascii.Error, ValueError) as error:
        raise refuse(
            record, f"{what} is no base64 ({error})", "encode the whole file anew"
        ) from error


def _read_fps(record: Record, fps: object, what: str) -> float | None:
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
        raise refuse(record, f"{what} has fps {fps!r}", "give a number above 0")
    return float(fps)
