"""Tokenise a set of files once, under a key of all that the result depends on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict, TypeVar

import pyarrow as pa

from omnilit.data.cache import COMPLETE, FORMAT, INFO, SCHEMA, TokenFile, pack_batch, publish
from omnilit.data.encode import get_backend
from omnilit.data.files import DataFile, file_size, fingerprint
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.pool import count_cpus, map_in_order
from omnilit.data.quarantine import (
    BadRecord,
    check_bad_fraction,
    read_quarantine,
    write_bad,
)
from omnilit.data.readers import RawRow, parse_row, read_rows
from omnilit.data.transforms import (
    CheckedTransform,
    Outcome,
    Transform,
    TransformSettings,
    build_transform,
    encode_or_skip,
)
from omnilit.errors import DataError
from omnilit.logging import get_logger
from omnilit.types import Record

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
ROWS_PER_BATCH: Final = 512
# Below this, starting processes takes longer than they save
RENDERER: Final = "transformers.utils.chat_template_utils"  # half a worker's start-up
MIN_BYTES_FOR_WORKERS: Final = 8 * 2**20
PART: Final = "tokens-00000.arrow"
BAD: Final = "bad.jsonl"

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What to prepare.

    Args:
        files: Data files, in order.
        transform: How records become samples.
        cache_dir: Where prepared data is kept.
        source: Name of the data source, for messages and bad records.
        silent_exception: Skip bad records.
        max_bad_fraction: Share of them that stops all the same.
        num_workers: Processes that tokenise; None for as many as there are processors, where
            the files are large enough to pay for them.
    """

    files: tuple[DataFile, ...]
    transform: TransformSettings
    cache_dir: Path
    source: str = "train"
    silent_exception: bool = False
    max_bad_fraction: float = 0.01
    num_workers: int | None = None


class PreparedInfo(TypedDict):
    """What was prepared, ready for JSON.

    `files` are the paths of today: the folder at `path` may have been made when the same contents
    had others.

    Records are counted by what became of them: `num_truncated` and `num_cut` lost tokens (the
    latter within a message), `num_dropped` were longer than `max_seq_len`, truncation left
    `num_unsupervised` nothing to train, `num_bad` could not be used.
    """

    path: str
    source: str
    files: list[str]
    num_records: int
    num_samples: int
    num_tokens: int
    num_targets: int
    num_truncated: int
    num_cut: int
    num_dropped: int
    num_unsupervised: int
    num_bad: int
    num_weighted: int


@dataclass(slots=True)
class _Counts:
    num_records: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_truncated: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    num_unsupervised: int = 0
    num_bad: int = 0
    num_weighted: int = 0

    def add(self, other: _Counts) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class _Work(NamedTuple):
    """What every worker holds."""

    transform: Transform
    files: tuple[str, ...]
    source: str
    is_silent: bool


class _Rows(NamedTuple):
    """Rows of one file, and whether they are its first."""

    file: int
    rows: list[RawRow]
    is_first: bool


class _Done(NamedTuple):
    """What became of some rows; the batch is serialised."""

    batch: bytes
    counts: _Counts
    bad: tuple[BadRecord, ...]


def prepare(
    request: PrepareRequest,
    tokenizer: PreTrainedTokenizerBase,
    *,
    media: MediaProcessor | None = None,
    on_bad: Callable[[Sequence[BadRecord]], None] | None = None,
) -> PreparedInfo:
    """Tokenise the files of a request, or find the result of an earlier time.

    The folder's name is a key of the files' contents and order, the tokenizer with its template,
    the settings and the format, so that a stale result is never found, and data that was moved
    is. It appears whole or not at all. One process should call this and the others open the result.

    Args:
        request: What to prepare.
        tokenizer: The model's.
        media: Of a model that takes images, videos or sounds.
        on_bad: Is given the records that were skipped, before too many of them or anything else
            stops the run.

    Returns:
        Where the samples are (see `open_prepared`) and how many.

    Raises:
        DataError: A record cannot be used and must not be skipped, too many cannot be used, the
            data set is empty, or the cache cannot be written.
        ConfigError: The tokenizer or template cannot be used.
    """
    transform = build_transform(request.transform, tokenizer, media)
    folder = request.cache_dir / cache_key(request, transform, tokenizer, media)
    is_new = not (folder / COMPLETE).is_file()
    if not is_new and media is not None and _is_mended(_info(request, folder), request, transform):
        (folder / COMPLETE).unlink()  # what is written takes its place
        is_new = True
    if is_new:
        started = time.perf_counter()
        try:
            _write(request, transform, folder, on_bad)
        except OSError as error:
            raise DataError(
                problem=f"the tokenised data cannot be written ({error})",
                fix="free space, or set OMNILIT_CACHE to a folder that can be written",
                file=str(request.cache_dir),
            ) from error
        logger.info("tokenised %s in %.1f s", request.source, time.perf_counter() - started)
    info = _info(request, folder)
    if info["num_bad"] and not request.silent_exception:  # prepared by somebody who skips
        bad = next(read_bad(info))
        raise DataError(problem=bad.reason, fix=bad.fix, file=bad.file, row=bad.row)
    if not is_new and on_bad is not None:
        on_bad(list(read_bad(info)))
    check_bad_fraction(info["num_bad"], info["num_records"], limit=request.max_bad_fraction)
    return info


def _info(request: PrepareRequest, folder: Path) -> PreparedInfo:
    found = json.loads((folder / INFO).read_text(encoding="utf-8"))["counts"]
    paths = [file.path for file in request.files]
    return PreparedInfo(path=str(folder), source=request.source, files=paths, **found)


def _is_mended(info: PreparedInfo, request: PrepareRequest, transform: Transform) -> bool:
    """Whether a record that was bad is not any more: its media are no part of the key."""
    bad = {(one.file, one.row) for one in read_bad(info)}
    for file in request.files:
        rows = {row for path, row in bad if path == file.path}
        for raw in read_rows(file) if rows else ():
            if raw.row in rows and _is_good(raw, file.path, transform):
                return True
            if raw.row >= max(rows):
                break
    return False


def _is_good(raw: RawRow, path: str, transform: Transform) -> bool:
    try:
        transform.encode([parse_row(raw, file=path, source="")])
    except DataError:
        return False
    return True


def read_bad(info: PreparedInfo) -> Iterator[BadRecord]:
    """The records that were skipped."""
    folder = Path(info["path"])
    then = json.loads((folder / INFO).read_text(encoding="utf-8"))["files"]
    now = dict(zip(then, info["files"], strict=True))
    for record in read_quarantine(folder / BAD):
        yield record._replace(source=info["source"], file=now.get(record.file, record.file))


def cache_key(
    request: PrepareRequest,
    transform: Transform,
    tokenizer: PreTrainedTokenizerBase,
    media: MediaProcessor | None = None,
) -> str:
    """A name for the result: equal exactly when all that it depends on is."""
    template, settings, own = transform.template, request.transform, ""
    if isinstance(transform, CheckedTransform):
        own = transform.own.fingerprint()  # which settings it reads is not known
    else:
        settings = replace(settings, chat_template=template.name if template else "")
    parts = {
        "format": FORMAT,
        "files": [(file.format, fingerprint(file)) for file in request.files],
        "tokenizer": get_backend(tokenizer).to_str(),
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": template.jinja if template else "",
        "transform": asdict(settings),
        "own": own,
        "media": "" if media is None else media.fingerprint(),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def encode_rows(work: _Work, rows: _Rows) -> _Done:
    """Parse, tokenise and pack some rows; runs in worker processes."""
    path = work.files[rows.file]
    records: list[Record] = []
    bad: list[BadRecord] = []
    for raw in rows.rows:
        try:
            records.append(parse_row(raw, file=path, source=work.source))
        except DataError as error:
            if not work.is_silent:
                raise
            bad.append(BadRecord.of(error, source=work.source, file=path, row=raw.row))
    outcome = Outcome([])
    if records:
        outcome = encode_or_skip(work.transform, records, is_silent=work.is_silent)
        if rows.is_first:
            _check_first(work, records, {record.row for record in outcome.bad})
    bad += outcome.bad
    batch = pack_batch([(sample, rows.file) for sample in outcome.samples])
    counts = _Counts(
        num_records=len(rows.rows),
        num_samples=batch.num_rows,
        num_tokens=int(batch.column("num_tokens").to_numpy().sum()),
        num_targets=int(batch.column("num_targets").to_numpy().sum()),
        num_truncated=outcome.num_truncated,
        num_cut=outcome.num_cut,
        num_dropped=outcome.num_dropped,
        num_unsupervised=outcome.num_unsupervised,
        num_bad=len(bad),
        num_weighted=sum(sample.weights is not None for sample in outcome.samples),
    )
    return _Done(_to_bytes(batch), counts, tuple(bad))


def _check_first(work: _Work, records: list[Record], bad_rows: set[int]) -> None:
    """Decode what is trained of a file's first good record: its template and tokenizer agree."""
    good = (record for record in records if record.origin.row not in bad_rows)
    if (first := next(good, None)) is not None:
        work.transform.check(first)


def _write(
    request: PrepareRequest,
    transform: Transform,
    folder: Path,
    on_bad: Callable[[Sequence[BadRecord]], None] | None,
) -> None:
    with publish(folder) as staged:
        try:
            counts = _tokenize(request, transform, staged)
        finally:
            if on_bad is not None:
                on_bad(list(read_quarantine(staged / BAD)))
        paths = [file.path for file in request.files]
        info = {"files": paths, "parts": [PART], "counts": asdict(counts)}
        (staged / INFO).write_text(json.dumps(info), encoding="utf-8")


def _tokenize(request: PrepareRequest, transform: Transform, folder: Path) -> _Counts:
    """Write the samples and the bad records to `folder`."""
    paths = tuple(file.path for file in request.files)
    work = _Work(transform, paths, request.source, request.silent_exception)
    total, by_file = _Counts(), [_Counts() for _ in paths]
    batches = chain.from_iterable(map(_batch_rows, range(len(paths)), request.files))
    read: list[int] = []  # the file of each batch under way
    with TokenFile(folder / PART) as tokens:
        done = map_in_order(
            encode_rows,
            work,
            _noted(batches, read),
            num_workers=_choose_workers(request),
            preload=(__name__, RENDERER),
        )
        for one in done:
            tokens.write(_from_bytes(one.batch))
            total.add(one.counts)
            by_file[read.pop(0)].add(one.counts)
            write_bad(folder / BAD, one.bad)
            limit = request.max_bad_fraction
            check_bad_fraction(total.num_bad, total.num_records, limit=limit, is_final=False)
    _check_counts(request, total, by_file)
    return total


def _check_counts(request: PrepareRequest, total: _Counts, by_file: list[_Counts]) -> None:
    for file, counts in zip(request.files, by_file, strict=True):
        if counts.num_unsupervised and not counts.num_targets:
            raise DataError(
                problem="no token in the whole file is trained",
                fix="check loss_mask, data.truncation_side and data.max_seq_len",
                file=file.path,
            )
    is_checked_only = request.transform.data_type == "diffusion" and total.num_records
    if not total.num_samples and not is_checked_only:
        raise DataError(
            problem=f"the data set is empty: {total.num_records} records, {total.num_dropped} of "
            f"them dropped for their length and {total.num_bad} bad",
            fix="add records, or raise data.max_seq_len",
            file=", ".join(file.path for file in request.files),
        )


def _choose_workers(request: PrepareRequest) -> int:
    if request.num_workers is not None:
        return request.num_workers
    sizes = [file_size(file) for file in request.files]
    if None not in sizes and sum(size or 0 for size in sizes) < MIN_BYTES_FOR_WORKERS:
        return 0
    return count_cpus()


def _batch_rows(index: int, file: DataFile) -> Iterator[_Rows]:
    is_first = True
    for rows in _batched(read_rows(file), ROWS_PER_BATCH):
        yield _Rows(index, rows, is_first)
        is_first = False


def _noted(batches: Iterable[_Rows], read: list[int]) -> Iterator[_Rows]:
    for batch in batches:
        read.append(batch.file)
        yield batch


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _to_bytes(batch: pa.RecordBatch) -> bytes:
    return batch.serialize().to_pybytes()


def _from_bytes(data: bytes) -> pa.RecordBatch:
    return pa.ipc.read_record_batch(pa.py_buffer(data), SCHEMA)
