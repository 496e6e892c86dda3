"""Small files of plain values and tensors that can be read without running code."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, Final

import torch

from omnilit.errors import CheckpointError

# What torch raises on bytes that it did not write, or that were changed since
DAMAGE: Final = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    struct.error,
    pickle.UnpicklingError,
)


def pack_plain(name: str, value: object) -> bytes:
    """Numbers, text, lists, dicts and tensors as the content of a file.

    Args:
        name: The file's, for the message.
        value: As it is now: what changes later is not in the bytes.

    Raises:
        CheckpointError: `value` holds something that `read_plain` would refuse to load.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} would hold more than plain values and tensors: {_reason(error)}"
        ) from error
    return buffer.getvalue()


def read_plain(path: Path) -> Any:
    """Read a file of what `pack_plain` gave, onto the CPU.

    Raises:
        CheckpointError: The file is not there, torn, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0]
