"""Which rank takes which micro-batch of a window."""

from __future__ import annotations

from collections.abc import Sequence


def balance(costs: Sequence[float], data_size: int) -> list[list[int]]:
    """Deal a window's items so that ranks which wait for each other have alike work.

    Ranks meet at every micro-batch, since the shards of the parameters are gathered for it. So
    items of alike cost run at the same time: sorted by cost, the dearest first, and dealt in
    turn; every other turn the other way round, so that no rank always takes the dearest.

    Args:
        costs: Of each item; a multiple of `data_size`.
        data_size: Number of ranks.

    Returns:
        The items of each rank, in the order in which they run.
    """
    order = sorted(range(len(costs)), key=lambda item: (-costs[item], item))
    ranks: list[list[int]] = [[] for _ in range(data_size)]
    for turn in range(len(costs) // data_size):
        dealt = order[turn * data_size : (turn + 1) * data_size]
        for rank, item in enumerate(reversed(dealt) if turn % 2 else dealt):
            ranks[rank].append(item)
    return ranks
