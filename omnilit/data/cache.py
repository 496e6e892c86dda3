"""Prepared data on disk: tokenised samples in Arrow, written once and mapped into memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from omnilit.data.labels import count_targets, label_spans
from omnilit.errors import DataError
from omnilit.types import IGNORE, Origin, Sample

FORMAT: Final = 1  # a part of every cache key: raise it when the layout or tokenising changes
COMPLETE: Final = "COMPLETE"
INFO: Final = "info.json"
ROWS_PER_BATCH: Final = 1024
SCHEMA: Final = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),  # start, end, start, end, ... of what is trained
        "num_tokens": pa.int32(),
        "num_targets": pa.int32(),
        "file": pa.int32(),  # index into the list of files in info.json
        "row": pa.int64(),
    }
)


class SampleWriter:
    """Writes samples to one Arrow file, a batch at a time; a context manager.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._rows: list[tuple[Sample, int]] = []

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is left and close the file."""
        if kind is None:
            self._flush()
        self._writer.close()
        self._sink.close()

    def write(self, sample: Sample, *, file: int) -> None:
        """Add a sample of the `file`-th data file."""
        self._rows.append((sample, file))
        if len(self._rows) >= ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        samples = [sample for sample, _ in self._rows]
        spans = [np.asarray(label_spans(s.labels), np.int32).reshape(-1) for s in samples]
        columns = [
            _to_lists([s.input_ids for s in samples]),
            _to_lists(spans),
            pa.array(np.asarray([len(s) for s in samples], np.int32)),
            pa.array(np.asarray([count_targets(s) for s in samples], np.int32)),
            pa.array(np.asarray([file for _, file in self._rows], np.int32)),
            pa.array(np.asarray([s.origin.row for s in samples], np.int64)),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._rows = []


class TokenDataset:
    """Prepared samples by index; tokens stay on disk until they are asked for.

    Pickled by its path, so that it crosses to worker processes without its contents.

    Args:
        path: A folder that `prepare` finished.

    Raises:
        DataError: The folder is missing or unfinished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / COMPLETE).is_file():
            raise DataError(
                problem="is not a finished folder of prepared data",
                fix="start again, so that the data is prepared anew",
                file=str(self.path),
            )
        info = json.loads((self.path / INFO).read_text(encoding="utf-8"))
        self._source: str = info["source"]
        self._files: list[str] = info["files"]
        self._batches: list[pa.RecordBatch] = []
        for part in info["parts"]:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path / part)))
            self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        self.lengths: npt.NDArray[np.int32] = self._column("num_tokens")
        self.num_targets: npt.NDArray[np.int32] = self._column("num_targets")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; its ids are a view of the mapped file."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[place]
        row = index - int(self._ends[place]) + batch.num_rows
        ids = _from_list(batch.column(0), row)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        for start, end in _from_list(batch.column(1), row).reshape(-1, 2).tolist():
            labels[start:end] = ids[start:end]
        file = self._files[batch.column(4)[row].as_py()]
        return Sample(ids, labels, Origin(self._source, file, batch.column(5)[row].as_py()))

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[str]]:
        """Travel as a path."""
        return TokenDataset, (str(self.path),)

    def _column(self, name: str) -> npt.NDArray[np.int32]:
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches])


def open_prepared(path: str | Path) -> TokenDataset:
    """The samples that `prepare` wrote to `path`; see `TokenDataset`."""
    return TokenDataset(path)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Write a folder out of sight and show it only once it is whole.

    Yields:
        A folder beside `folder` to write to. Leaving without an error marks it complete and
        renames it; with an error it is removed. Where another process published the same
        folder meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f"{folder.name}.staged-", dir=folder.parent))
    try:
        yield staged
        (staged / COMPLETE).touch()
        for file in (*staged.iterdir(), staged):
            _sync(file)
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                staged.rename(folder)
            except OSError:  # published by another process since the line above
                if not (folder / COMPLETE).is_file():
                    raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _from_list(column: pa.Array, row: int) -> npt.NDArray[np.int32]:
    assert isinstance(column, pa.ListArray)
    return column[row].values.to_numpy()
