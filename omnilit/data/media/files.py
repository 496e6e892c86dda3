"""The bytes of a medium: from a file, from the net, or from the record itself."""

from __future__ import annotations

import io
import posixpath
from typing import IO, Final
from urllib.error import URLError
from urllib.request import Request, urlopen

from omnilit.data.references import is_address
from omnilit.errors import DataError
from omnilit.types import Medium, Origin

TIMEOUT_S: Final = 20.0
MAX_DOWNLOAD: Final = 2**31  # bytes


def media_error(origin: Origin, medium: Medium, problem: str, fix: str) -> DataError:
    """An error that names the record, and the medium in it."""
    where = medium.path or f"a {medium.kind} within the record"
    return DataError(problem=f"{where}: {problem}", fix=fix, file=origin.file, row=origin.row)


def open_medium(medium: Medium, origin: Origin) -> IO[bytes]:
    """The bytes of a medium, to be read.

    Args:
        medium: Its path is relative to the file of the record.
        origin: Of the record.

    Raises:
        DataError: It is not there.
    """
    if medium.data is not None:
        return io.BytesIO(medium.data)
    path = locate(medium, origin)
    try:
        if "://" in path:
            import fsspec

            files, place = fsspec.core.url_to_fs(path)
            return io.BytesIO(files.cat_file(place))
        return open(path, "rb")  # noqa: PTH123 - the reader closes it
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise media_error(
            origin, medium, f"cannot be read ({reason})", "correct the path, or remove the record"
        ) from error


def locate(medium: Medium, origin: Origin) -> str:
    """Where the file of a medium is, seen from here."""
    if "://" in medium.path or posixpath.isabs(medium.path):
        return medium.path
    return posixpath.join(posixpath.dirname(origin.file), medium.path)


def fetch(medium: Medium, origin: Origin) -> Medium:
    """The same medium with its bytes, where it is on the net; others as they are.

    Raises:
        DataError: It cannot be had.
    """
    if medium.frames:
        return medium._replace(frames=tuple(fetch(frame, origin) for frame in medium.frames))
    if medium.data is not None or not is_address(medium.path):
        return medium
    request = Request(medium.path, headers={"User-Agent": "omnilit"})  # noqa: S310 - http only
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            data = answer.read(MAX_DOWNLOAD)
    except (URLError, OSError, ValueError) as error:
        raise media_error(
            origin,
            medium,
            f"cannot be fetched ({error})",
            "look whether this machine has a way to it, or save it beside the data",
        ) from error
    return medium._replace(data=data)
