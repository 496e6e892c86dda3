"""The items of a run, which are its micro-batches in one global order, and who provides them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from omnilit.types import MicroBatch


class Position(NamedTuple):
    """How far training is, the same on every rank and for any number of ranks.

    Args:
        pass_index: 0-based trip through the data.
        items: Micro-batches of that pass that were consumed.
    """

    pass_index: int = 0
    items: int = 0


@dataclass(frozen=True, slots=True)
class WindowLayout:
    """How a window is dealt: micro-batch i of rank r is one of items i * data_size + (0, 1, ...).

    So 1 rank with 4 micro-batches, 2 with 2 and 4 with 1 train the same steps.

    Args:
        data_rank: This rank among those that read different data.
        data_size: Number of such ranks.
        window_size: Micro-batches that each of them runs in a step.
    """

    data_rank: int = 0
    data_size: int = 1
    window_size: int = 1

    @property
    def num_items(self) -> int:
        """Micro-batches of a window on all ranks."""
        return self.data_size * self.window_size


class Fetched(NamedTuple):
    """One micro-batch of this rank.

    Args:
        batch: What is trained on.
        state: What its provider must remember once it is trained on; None for nothing.
        counts: What else to sum over a window's micro-batches and ranks.
    """

    batch: MicroBatch
    state: Any = None
    counts: Mapping[str, float] = {}


class ItemStream(Protocol):
    """Provides the items of a run, from any position on and for any layout of ranks."""

    @property
    def budget(self) -> int:
        """Tokens of a full item, or samples where an item is a number of samples."""
        ...

    @property
    def is_per_rank(self) -> bool:
        """Whether each rank's `state_dict` holds a part only."""
        ...

    def fetch(
        self, start: Position, *, num_windows: int, layout: WindowLayout
    ) -> Iterator[Fetched]:
        """This rank's micro-batches of the next windows, `window_size` a window, in order."""
        ...

    def empty(self) -> Fetched:
        """A micro-batch without data that has all counts; what stands in for a failed one."""
        ...

    def open(self, position: Position) -> Position:
        """The same place, as the beginning of the next pass where a pass is used up."""
        ...

    def advance(self, start: Position, num_items: int) -> Position:
        """Where a window that begins at `start` ends."""
        ...

    def count_windows(self, start: Position, num_items: int) -> int | None:
        """Windows of `num_items` from `start` to the end of its pass; None if not known."""
        ...

    def commit(
        self,
        window: Sequence[Fetched],
        sums: Mapping[str, float],
        *,
        start: Position,
        is_last: bool,
    ) -> None:
        """A window is about to be trained on.

        Args:
            window: This rank's micro-batches.
            sums: Of `Fetched.counts`, over all ranks.
            start: Where the window begins.
            is_last: Of its epoch.

        Raises:
            DataError: The sums say that the run must not go on; on every rank.
        """
        ...

    def state_dict(self) -> dict[str, object]:
        """What a position is a position in, as plain values, and what this rank must remember."""
        ...

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave: one of each rank, or one that all share.

        Raises:
            ConfigError: The data or the settings are not what the position was saved for.
        """
        ...
