"""Counting which bound kernels the first step calls, since bound is not called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.compiler import assume_constant_result


class CallCounter:
    """Calls by field of `ops_implementation`, until `stop`.

    Attributes:
        is_counting: False from `stop` on.
    """

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self.is_counting = True

    def add(self, field: str) -> None:
        """Count one call, in code that is never compiled."""
        if self.is_counting:
            self._calls[field] += 1

    def adder(self, field: str) -> Callable[[], None]:
        """A function that counts one call, also where the calling code is compiled.

        There it counts the compilation of a call, and leaves nothing in the compiled code: a
        count that changes with every call would compile anew with every call.
        """

        def add() -> None:
            self.add(field)

        return assume_constant_result(add)

    def of(self, field: str) -> int:
        """Calls so far."""
        return self._calls[field]

    def stop(self) -> None:
        """Count no more; what was counted stays."""
        self.is_counting = False
