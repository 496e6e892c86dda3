"""A reader of a user's own, for tests of `data.datasets_type`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Countdown:
    """A reader of the user's own."""

    def __init__(self, path: str) -> None:
        self.number = int(path)

    def fingerprint(self) -> str:
        return f"countdown-{self.number}"

    def rows(self, start: int) -> Iterator[Mapping[str, Any]]:
        for number in range(self.number - start, 0, -1):
            yield {"text": str(number)}


class Careless(Countdown):
    """Gives something that is no record in place of 3, and fails at 1; 0 has no fingerprint."""

    def fingerprint(self) -> str:
        return f"careless-{6 // self.number}"

    def rows(self, start: int) -> Iterator[Mapping[str, Any]]:
        for fields in super().rows(start):
            if fields["text"] == "1":
                raise LookupError("nothing there")
            yield ("text", 3) if fields["text"] == "3" else fields  # type: ignore[misc]
