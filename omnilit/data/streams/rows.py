"""The rows of streamed data, dealt to virtual shards: by whole files, or row by row."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from omnilit.data.files import DataFile
from omnilit.data.readers import RawRow, read_rows

BLOCK_ROWS = 10_000  # rows that are shuffled together, over all shards
KEPT_BLOCKS = 3  # shards that share a reader may be so far apart before it begins again
MAX_UNEVEN = 1.05  # the largest share of whole files, in mean shares
SIZE_OF_NUMBER = 8

Row = tuple[str, RawRow]  # with its file


def deal_files(sizes: Sequence[int | None], num_shards: int) -> list[list[int]] | None:
    """Whole files for each shard, or None where no deal is even enough to be worth it.

    A shard that has less than others waits for them at the end of every pass.

    Args:
        sizes: Bytes of each file; None where it is not known.
        num_shards: Shards.
    """
    known = [size for size in sizes if size is not None]
    if num_shards > len(sizes) or len(known) < len(sizes):
        return None
    shares: list[list[int]] = [[] for _ in range(num_shards)]
    loads = [(0, shard) for shard in range(num_shards)]
    for file in sorted(range(len(known)), key=lambda i: (-known[i], i)):
        load, shard = heapq.heappop(loads)
        shares[shard].append(file)
        heapq.heappush(loads, (load + known[file], shard))
    if max(load for load, _ in loads) * num_shards > MAX_UNEVEN * sum(known):
        return None
    return [sorted(share) for share in shares]


def size_of(value: object) -> int:
    """About how much there is to tokenise in a row, in bytes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return SIZE_OF_NUMBER


class Blocks:
    """Rows of some files in blocks, read forwards; the last few blocks are kept.

    Args:
        files: In order.
        size: Rows of a block.
    """

    def __init__(self, files: Sequence[DataFile], size: int) -> None:
        self._files, self._size = files, size
        self._kept: dict[int, list[Row]] = {}
        self._reader: Iterator[Row] = iter(())
        self._next = -1  # the block that the reader gives next

    def get(self, index: int) -> list[Row]:
        """Block `index`; empty behind the last one."""
        if index in self._kept:
            return self._kept[index]
        if not 0 <= self._next <= index:
            self._reader, self._next = self._iterate(), 0
        if self._next < index:
            skipped = (index - self._next) * self._size
            next(islice(self._reader, skipped - 1, skipped), None)
        block = list(islice(self._reader, self._size))
        self._next = index + 1
        self._kept[index] = block
        if len(self._kept) > KEPT_BLOCKS:
            del self._kept[min(self._kept)]
        return block

    def _iterate(self) -> Iterator[Row]:
        for file in self._files:
            for raw in read_rows(file):
                yield file.path, raw


class SourceRows:
    """The rows of one source for the shards of one reader, reshuffled every round.

    Where whole files can be dealt evenly, each shard reads its own. Else every reader reads all
    files, once for all of its shards: of each shuffled block the largest rows go first, each to
    the shard that has least of the block, so that shards are equally long.

    Args:
        files: Of the source, in order.
        sizes: Their bytes, where they are known.
        index: Of the source.
        num_shards: Shards of the whole stream.
        seed: Of the shuffling.
        is_shared: A source of fewer rows than shards goes to every shard whole; else each row
            goes to one of them.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        sizes: Sequence[int | None],
        *,
        index: int,
        num_shards: int,
        seed: int,
        is_shared: bool,
    ) -> None:
        self._index, self._num_shards, self._seed = index, num_shards, seed
        self._is_shared = is_shared
        shares = deal_files(sizes, num_shards)
        self._own: list[Blocks] | None = None
        if shares is not None:
            size = max(1, BLOCK_ROWS // num_shards)
            self._own = [Blocks([files[i] for i in share], size) for share in shares]
        self._all = Blocks(files, BLOCK_ROWS)
        self._dealt: dict[tuple[int, int], list[list[Row]]] = {}

    def get(self, shard: int, round_index: int, block: int) -> list[Row] | None:
        """A shard's rows of a block in the order of a round; None behind the last block."""
        if self._own is not None:
            rows = self._own[shard].get(block)
            return self._shuffle(rows, round_index, block, shard) if rows else None
        rows = self._all.get(block)
        if not rows:
            return None
        if self._is_shared and block == 0 and len(rows) < self._num_shards:
            return self._shuffle(rows, round_index, block, shard)
        return self._deal(rows, round_index, block)[shard]

    def _deal(self, rows: list[Row], round_index: int, block: int) -> list[list[Row]]:
        key = (round_index, block)
        if len(rows) < self._num_shards:  # who has none is the same in every round
            place = np.arange(self._num_shards) - block
            return [[rows[i]] if i < len(rows) else [] for i in place % self._num_shards]
        if key not in self._dealt:
            shuffled = self._shuffle(rows, round_index, block, self._num_shards)
            self._dealt = dict(list(self._dealt.items())[1 - KEPT_BLOCKS :])
            self._dealt[key] = _deal_rows(shuffled, self._num_shards, first=round_index + block)
        return self._dealt[key]

    def _shuffle(self, rows: list[Row], round_index: int, block: int, shard: int) -> list[Row]:
        key = np.random.SeedSequence([self._seed, self._index, round_index, block, shard])
        order = np.random.Generator(np.random.Philox(key)).permutation(len(rows))
        return [rows[i] for i in order]


def _deal_rows(rows: list[Row], num_shards: int, *, first: int) -> list[list[Row]]:
    """Each row to one shard, in the rows' order, with about equal sizes."""
    sizes = [max(size_of(raw.data), 1) for _, raw in rows]
    # which shard gets what is left over changes from block to block
    loads = [(0, (shard - first) % num_shards, shard) for shard in range(num_shards)]
    heapq.heapify(loads)
    taken: list[list[int]] = [[] for _ in range(num_shards)]
    for row in sorted(range(len(rows)), key=lambda i: (-sizes[i], i)):
        load, turn, shard = heapq.heappop(loads)
        taken[shard].append(row)
        heapq.heappush(loads, (load + sizes[row], turn, shard))
    return [[rows[i] for i in sorted(own)] for own in taken]
