"""Counting which bound kernels the first step calls, since bound is not called."""

from __future__ import annotations

from collections import Counter


class CallCounter:
    """Calls by field of `ops_implementation`, until `stop`."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._is_counting = True

    def add(self, field: str) -> None:
        """Count one call."""
        if self._is_counting:
            self._calls[field] += 1

    def of(self, field: str) -> int:
        """Calls so far."""
        return self._calls[field]

    def stop(self) -> None:
        """Count no more; what was counted stays."""
        self._is_counting = False
