"""How far a virtual shard of streamed data is, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omnilit.data.warmup import BudgetSchedule


class Place(NamedTuple):
    """Where a sample comes from, in numbers that find it again.

    Args:
        source: Index of the source.
        round: Trips of the shard through the source before this one.
        block: Of the source.
        row: Of the shard's rows of that block, 0-based, in shuffled order.
        chunk: Which of the row's samples.
    """

    source: int
    round: int
    block: int
    row: int
    chunk: int


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What the items of a stream depend on.

    Args:
        seed: Of everything random.
        budget: Tokens that an item may hold.
        num_shards: Virtual shards.
        buffer_size: Samples to choose from before an item is packed.
        samples_per_item: Given, an item is so many samples in their order.
        drop_last: Leave out what does not fill such an item at the end of a shard's pass.
        is_silent: Skip bad records.
    """

    seed: int
    budget: BudgetSchedule
    num_shards: int = 1
    buffer_size: int = 200
    samples_per_item: int | None = None
    drop_last: bool = False
    is_silent: bool = False


@dataclass(slots=True)
class ShardState:
    """How far a shard is.

    Args:
        pass_index: Passes through the data that are over.
        items: Items that it made in this pass, empty ones at its end too.
        is_over: It has nothing left in this pass.
        draws: Sources drawn so far, in all passes.
        rounds: Finished trips through each source, in all passes.
        blocks: Present block of each source.
        rows: Rows taken of that block.
        ended: Whether each source was used up in this pass.
        drawn: Rows taken of each source, in all passes.
        samples: Samples that they gave.
        tokens: Tokens that they gave.
        waiting: Samples read and not yet in an item, with their lengths.
    """

    pass_index: int = 0
    items: int = 0
    is_over: bool = False
    draws: int = 0
    rounds: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    waiting: list[tuple[Place, int]] = field(default_factory=list)

    @classmethod
    def fresh(cls, num_sources: int) -> ShardState:
        """At the very beginning."""
        columns = ([0] * num_sources for _ in range(6))
        rounds, blocks, rows, drawn, samples, tokens = columns
        return cls(
            rounds=rounds,
            blocks=blocks,
            rows=rows,
            ended=[False] * num_sources,
            drawn=drawn,
            samples=samples,
            tokens=tokens,
        )

    def has_ended(self, pass_index: int) -> bool:
        """Whether nothing is left of a pass."""
        return self.pass_index == pass_index and self.is_over and not self.waiting

    @property
    def age(self) -> tuple[int, int]:
        """The larger, the further the shard is."""
        return self.pass_index, self.items

    def to_plain(self) -> list[object]:
        """For a checkpoint."""
        lists = (self.rounds, self.blocks, self.rows, self.ended)
        sums = (self.drawn, self.samples, self.tokens)
        waiting = [[*place, size] for place, size in self.waiting]
        head = [self.pass_index, self.items, self.is_over, self.draws]
        return [*head, *map(list, lists), *map(list, sums), waiting]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> ShardState:
        """From `to_plain`."""
        *head, waiting = plain
        numbers: list[Any] = [list(one) if isinstance(one, list) else one for one in head]
        places = [(Place(*row[:-1]), row[-1]) for row in waiting]
        return cls(*numbers, waiting=places)
