"""Let the code of a module find another tensor where it looks for one of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn


@contextmanager
def lent(module: nn.Module, attribute: str, weight: Tensor) -> Iterator[None]:
    """Let the code of `module` find `weight` where it looks for one of its parameters."""
    own = module._parameters  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as transformers does
    kept = own[attribute]
    own[attribute] = cast("nn.Parameter", weight)
    try:
        yield
    finally:
        own[attribute] = kept
