"""Streamed items of many shards on many ranks, in one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnilit.data.batches import WorkerSettings
from omnilit.data.files import DataFile
from omnilit.data.items import Fetched, Position, WindowLayout
from omnilit.data.multisource import Mixture, SourceSpec
from omnilit.data.streams.state import StreamSettings
from omnilit.data.streams.stream import StreamData, StreamedItems
from omnilit.data.transforms import Outcome
from omnilit.data.warmup import BudgetSchedule
from omnilit.errors import DataError
from omnilit.types import Record, Sample

Read = tuple[str, str, int]  # source, file, row


class SizedTransform:
    """A record says how long its samples are: {"sizes": [3, 5]}; "bad" ones are refused."""

    template = None

    def encode(self, records: Sequence[Record]) -> Outcome:
        samples, num_cut = [], 0
        for record in records:
            if record.fields.get("bad"):
                raise DataError(problem="bad", fix="", file="f", row=record.origin.row)
            num_cut += bool(record.fields.get("cut"))
            for size in record.fields["sizes"]:
                ids = np.full(size, record.origin.row, np.int32)
                samples.append(Sample(ids, ids, record.origin))
        return Outcome(samples, num_cut, num_cut)

    def check(self, record: Record) -> None:
        if record.fields.get("bad mask"):
            raise DataError(problem="bad mask", fix="", file="f", row=record.origin.row)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def open_stream(
    sources: Mapping[str, Sequence[Path]],
    settings: StreamSettings,
    *,
    weights: Sequence[float] | None = None,
    on_bad: Callable[[Any], None] | None = None,
    **mixture: Any,
) -> StreamedItems:
    """A stream of jsonl files whose records are those of `SizedTransform`."""
    shares = [1 / len(sources)] * len(sources) if weights is None else weights
    specs = tuple(SourceSpec(n, n, w) for n, w in zip(sources, shares, strict=True))
    files = tuple(tuple(DataFile(str(f), "jsonl") for f in found) for found in sources.values())
    data = StreamData(Mixture(specs, **mixture), files, SizedTransform(), "tokens")
    return StreamedItems(data, settings, workers=WorkerSettings(), on_bad=on_bad)


def settings(num_shards: int, *, budget: int = 16, buffer_size: int = 5, **more: Any) -> Any:
    """Settings with a small budget."""
    return StreamSettings(
        3, BudgetSchedule(budget), num_shards=num_shards, buffer_size=buffer_size, **more
    )


class Ranks:
    """Some ranks that take windows of one stream in step.

    Args:
        open_items: Opens the stream of a rank.
        size: Number of ranks.
        window_size: Micro-batches of each in a window.
    """

    def __init__(
        self, open_items: Callable[[], StreamedItems], *, size: int = 1, window_size: int = 1
    ) -> None:
        self.items = [open_items() for _ in range(size)]
        self.layouts = [WindowLayout(rank, size, window_size) for rank in range(size)]
        self.position = Position()

    def run(self, num_windows: int) -> list[Counter[Read]]:
        """What all ranks together read in each of the next windows."""
        return list(self._windows(num_windows))

    def run_passes(self, number: int, *, limit: int = 5000) -> list[Counter[Read]]:
        """What is read in each of the next passes."""
        found: list[Counter[Read]] = []
        read = Counter[Read]()
        for window in self._windows(limit):
            read += window
            if self.position.items == 0:
                found.append(read)
                read = Counter()
                if len(found) == number:
                    return found
        raise AssertionError(f"{len(found)} passes in {limit} windows")

    def _windows(self, num_windows: int) -> Iterator[Counter[Read]]:
        streams = [
            items.fetch(self.position, num_windows=num_windows, layout=layout)
            for items, layout in zip(self.items, self.layouts, strict=True)
        ]
        size = self.layouts[0].window_size
        for number in range(num_windows):
            windows = [[next(stream) for _ in range(size)] for stream in streams]
            self._commit(windows, is_last=number == num_windows - 1)
            origins = (o for window in windows for one in window for o in one.batch.origins)
            yield Counter((o.source, Path(o.file).name, o.row) for o in origins)

    def save(self) -> tuple[Position, list[Mapping[str, Any]]]:
        """The position and every rank's state, as plain as a checkpoint holds them."""
        return self.position, [json.loads(json.dumps(i.state_dict())) for i in self.items]

    def load(self, saved: tuple[Position, list[Mapping[str, Any]]]) -> None:
        """Go on from what another number of ranks may have saved."""
        self.position, states = saved
        plain = [{**s, "shards": {int(k): v for k, v in s["shards"].items()}} for s in states]
        for items in self.items:
            items.load_state_dicts(plain)

    def _commit(self, windows: list[list[Fetched]], *, is_last: bool) -> None:
        sums: Counter[str] = Counter()
        for window in windows:
            for one in window:
                sums.update(one.counts)
        for items, window in zip(self.items, windows, strict=True):
            items.commit(window, dict(sums), start=self.position, is_last=is_last)
        num_items = self.layouts[0].num_items
        (self.position,) = {items.advance(self.position, num_items) for items in self.items}
