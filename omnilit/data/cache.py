"""Prepared data on disk: tokenised samples in Arrow, written once and mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from omnilit.data.labels import count_targets, label_spans
from omnilit.errors import DataError
from omnilit.types import IGNORE, Medium, Origin, Sample

FORMAT: Final = 4  # a part of every cache key: raise it when the layout or tokenising changes
COMPLETE: Final = "COMPLETE"
INFO: Final = "info.json"
STAGED: Final = ".staged-"
STALE_S: Final = 24 * 3600.0
MEDIUM: Final = {  # see `types.Medium`
    "kind": pa.string(),
    "path": pa.string(),
    "data": pa.large_binary(),
    "fps": pa.float64(),
    "plan": pa.string(),
    "num_tokens": pa.int32(),
}
FRAMES: Final = pa.list_(pa.struct({name: MEDIUM[name] for name in ("path", "data")}))
SCHEMA: Final = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),  # start, end, start, end, ... of what is trained
        "weights": pa.list_(pa.float32()),  # one a span; null where all are 1
        "label": pa.int32(),  # of the last token, where it is no token; null elsewhere
        "pair_start": pa.int32(),  # null for one sequence
        "digest": pa.uint64(),  # of the tokens; equal samples have equal ones
        "num_tokens": pa.int32(),
        "num_targets": pa.int32(),
        "file": pa.int32(),  # index into the list of files in info.json
        "row": pa.int64(),
        "media": pa.list_(pa.struct({**MEDIUM, "frames": FRAMES})),  # null for text
    }
)


def pack_batch(samples: Sequence[tuple[Sample, int]]) -> pa.RecordBatch:
    """Samples, each with the index of its file, as a batch of `SCHEMA`."""
    only = [sample for sample, _ in samples]
    spans = [_spans_of(sample) for sample in only]
    ids = [sample.input_ids for sample in only]
    pairs = [sample.pair_start for sample in only]
    columns = [
        _to_lists(ids, np.int32),
        _to_lists([np.asarray(found, np.int32).reshape(-1) for found in spans], np.int32),
        _weights_of(only, spans),
        pa.array([_label_of(sample) for sample in only], pa.int32()),
        pa.array(pairs, pa.int32()),
        pa.array([_digest(sample) for sample in only], pa.uint64()),
        pa.array(np.asarray([len(sample) for sample in only], np.int32)),
        pa.array(np.asarray([_count_targets(sample) for sample in only], np.int32)),
        pa.array(np.asarray([file for _, file in samples], np.int32)),
        pa.array(np.asarray([sample.origin.row for sample in only], np.int64)),
        pa.array([_media_of(sample) for sample in only], SCHEMA.field("media").type),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


class TokenFile:
    """One Arrow file of samples that grows by batches; a context manager.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._writer.close()
        self._sink.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add a batch of `pack_batch`."""
        if batch.num_rows:
            self._writer.write_batch(batch)


class TokenDataset:
    """Prepared samples by index; tokens stay on disk until they are asked for.

    Pickled by its path, so that it crosses to worker processes without its contents.

    Args:
        path: A folder that `prepare` finished.
        source: Name of the data source, for the origin of every sample.
        files: Paths of the files that it was made of, likewise; by default those of that time.

    Raises:
        DataError: The folder is missing or unfinished.
    """

    def __init__(
        self, path: str | Path, *, source: str = "train", files: Sequence[str] | None = None
    ) -> None:
        self.path, self.source = Path(path), source
        if not (self.path / COMPLETE).is_file():
            raise DataError(
                problem="is not a finished folder of prepared data",
                fix="start again, so that the data is prepared anew",
                file=str(self.path),
            )
        info = json.loads((self.path / INFO).read_text(encoding="utf-8"))
        self._files: list[str] = list(info["files"] if files is None else files)
        self.has_weights = bool(info["counts"]["num_weighted"])
        self._batches: list[pa.RecordBatch] = []
        for part in info["parts"]:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path / part)))
            self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        self.lengths: npt.NDArray[np.int32] = self.column("num_tokens")
        self.num_targets: npt.NDArray[np.int32] = self.column("num_targets")

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
        spans = _from_list(batch.column(1), row).reshape(-1, 2).tolist()
        for start, end in spans:
            labels[start:end] = ids[start:end]
        if (label := batch.column(3)[row].as_py()) is not None:
            labels[-1] = label
        weights = None
        if (found := batch.column(2)[row].as_py()) is not None:
            weights = np.ones(len(ids), np.float32)
            for (start, end), weight in zip(spans, found, strict=True):
                weights[start:end] = weight
        file = self._files[batch.column("file")[row].as_py()]
        origin = Origin(self.source, file, batch.column("row")[row].as_py())
        media = tuple(map(_to_medium, batch.column("media")[row].as_py() or ()))
        return Sample(ids, labels, origin, weights, batch.column(4)[row].as_py(), media)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files, which the column `file` counts."""
        return tuple(self._files)

    def __reduce__(self) -> tuple[Callable[..., TokenDataset], tuple[str, str, list[str]]]:
        """Travel as a path."""
        return open_prepared, (str(self.path), self.source, self._files)

    def media_table(self) -> pa.Table:
        """The media of all samples in order: `sample` (its index), `kind`, `plan`, `num_tokens`."""
        tables = []
        for start, batch in zip([0, *self._ends.tolist()], self._batches, strict=False):
            column: Any = batch.column("media")
            owners = column.value_parent_indices().to_numpy().astype(np.int64)
            found = column.flatten()
            columns = {name: found.field(name) for name in ("kind", "plan", "num_tokens")}
            tables.append(pa.table({"sample": owners + start, **columns}))
        return pa.concat_tables(tables)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers of `SCHEMA`, one a sample; nulls become -1."""
        columns = [batch.column(name) for batch in self._batches]
        filled = [column.fill_null(-1) if column.null_count else column for column in columns]
        return np.concatenate([column.to_numpy(zero_copy_only=False) for column in filled])


def open_prepared(
    path: str | Path, source: str = "train", files: Sequence[str] | None = None
) -> TokenDataset:
    """The samples that `prepare` wrote to `path`; see `TokenDataset`."""
    return TokenDataset(path, source=source, files=files)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Write a folder out of sight and show it only once it is whole.

    Yields:
        A folder beside `folder` to write to. Leaving without an error marks it complete and
        renames it; with an error it is removed. Where another process published the same
        folder meanwhile, that one stays. What killed processes left beside it is removed, too.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    prefix = f"{folder.name}{STAGED}{_machine()}-{os.getpid()}-"
    staged = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
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


def _remove_stale(parent: Path) -> None:
    """Remove what was written out of sight by processes that are no more.

    Of a process on another machine that is not known; there a day without a change counts.
    """
    machine = _machine()
    for staged in parent.glob(f"*{STAGED}*"):
        owner = staged.name.rpartition(STAGED)[2].split("-")
        if len(owner) == 3 and owner[0] == machine:
            is_stale = not _is_alive(int(owner[1]))
        else:
            is_stale = _last_change(staged) < time.time() - STALE_S
        if is_stale:
            shutil.rmtree(staged, ignore_errors=True)


def _machine() -> str:
    """Another text wherever a process number means another process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        where = f"{boot} {Path('/proc/self/ns/pid').readlink()}"  # a container has its own
    except OSError:  # not Linux
        where = socket.gethostname()
    return hashlib.blake2b(where.encode(), digest_size=4).hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _last_change(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:  # it is being published or removed this moment
        return time.time()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_lists(arrays: Sequence[npt.NDArray[Any]], kind: type) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int32)
    values = np.concatenate([np.zeros(0, kind), *arrays]).astype(kind)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _spans_of(sample: Sample) -> list[tuple[int, int]]:
    """Trained ranges, each of one weight; a class label is none of them."""
    if _label_of(sample) is not None:
        return []
    spans = label_spans(sample.labels)
    if sample.weights is None:
        return spans
    changes = np.flatnonzero(np.diff(sample.weights)) + 1
    found: list[tuple[int, int]] = []
    for start, end in spans:
        inner = changes[(changes > start) & (changes < end)].tolist()
        found += pairwise([start, *inner, end])
    return found


def _weights_of(samples: Sequence[Sample], spans: Sequence[list[tuple[int, int]]]) -> pa.Array:
    rows = [
        None if sample.weights is None else [float(sample.weights[start]) for start, _ in found]
        for sample, found in zip(samples, spans, strict=True)
    ]
    return pa.array(rows, pa.list_(pa.float32()))


def _label_of(sample: Sample) -> int | None:
    """The last token's label where it is a class, not the token."""
    last = int(sample.labels[-1])
    is_class = last != IGNORE and bool((sample.labels[:-1] == IGNORE).all())
    return last if is_class and last != sample.input_ids[-1] else None


def _count_targets(sample: Sample) -> int:
    return count_targets(sample) if _label_of(sample) is None else 1  # also of one token alone


def _media_of(sample: Sample) -> list[dict[str, Any]] | None:
    return [
        {**medium._asdict(), "frames": [frame._asdict() for frame in medium.frames]}
        for medium in sample.media
    ] or None


def _to_medium(found: dict[str, Any]) -> Medium:
    frames = tuple(Medium("image", **frame) for frame in found.pop("frames"))
    return Medium(**found, frames=frames)


def _digest(sample: Sample) -> int:
    """Equal for equal tokens and media; of these the place or the bytes count."""
    state = hashlib.blake2b(sample.input_ids.tobytes(), digest_size=8)
    for medium in sample.media:
        for one in (medium, *medium.frames):
            state.update(one.path.encode() + b"\0" + (one.data or b""))
    return int.from_bytes(state.digest(), "little")


def _from_list(column: pa.Array, row: int) -> npt.NDArray[np.int32]:
    assert isinstance(column, pa.ListArray)
    return column[row].values.to_numpy()
