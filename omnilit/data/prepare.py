"""Tokenise a set of files once, under a key of all that the result depends on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict, TypeVar

from omnilit.data.cache import COMPLETE, FORMAT, INFO, SampleWriter, publish
from omnilit.data.encode import get_backend
from omnilit.data.labels import count_targets
from omnilit.data.sources import open_data, read_jsonl
from omnilit.data.transforms import (
    ConversationTransform,
    PlaintextTransform,
    TransformSettings,
    build_transform,
    resolve_settings,
)
from omnilit.errors import DataError
from omnilit.logging import get_logger
from omnilit.types import Sample

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
RECORDS_PER_BATCH: Final = 256
PART: Final = "tokens-00000.arrow"

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What to prepare.

    Args:
        files: Data files, in order.
        transform: How records become samples.
        cache_dir: Where prepared data is kept.
        source: Name of the data source, for the origin of every sample.
    """

    files: tuple[Path, ...]
    transform: TransformSettings
    cache_dir: Path
    source: str = "train"


class PreparedInfo(TypedDict):
    """What was prepared, ready for JSON.

    `num_unsupervised` counts the samples of which no token is trained, `num_truncated` and
    `num_dropped` the records longer than `max_seq_len`.
    """

    path: str
    num_records: int
    num_samples: int
    num_tokens: int
    num_targets: int
    num_truncated: int
    num_dropped: int
    num_unsupervised: int


@dataclass(slots=True)
class _Counts:
    num_records: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_unsupervised: int = 0

    def add(self, sample: Sample) -> None:
        targets = count_targets(sample)
        self.num_samples += 1
        self.num_tokens += len(sample)
        self.num_targets += targets
        self.num_unsupervised += not targets


def prepare(request: PrepareRequest, tokenizer: PreTrainedTokenizerBase) -> PreparedInfo:
    """Tokenise the files of a request, or find the result of an earlier time.

    The folder's name is a key of the files' names and contents, the tokenizer with its
    template, the settings and the format, so that a stale result is never found. It appears
    whole or not at all. One process should call this and the others open the result.

    Returns:
        Where the samples are (see `open_prepared`) and how many.

    Raises:
        DataError: A record cannot be used, the data set is empty, a file has nothing to train
            on, or the cache cannot be written.
        ConfigError: The tokenizer or template cannot be used.
    """
    transform = build_transform(request.transform, tokenizer)
    folder = request.cache_dir / cache_key(request, transform, tokenizer)
    if not (folder / COMPLETE).is_file():
        started = time.perf_counter()
        try:
            _write(request, transform, folder)
        except OSError as error:
            raise DataError(
                problem=f"the tokenised data cannot be written ({error})",
                fix="free space, or set OMNILIT_CACHE to a folder that can be written",
                file=str(request.cache_dir),
            ) from error
        logger.info("tokenised %s in %.1f s", request.source, time.perf_counter() - started)
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    return PreparedInfo(path=str(folder), **info["counts"])


def cache_key(
    request: PrepareRequest,
    transform: ConversationTransform | PlaintextTransform,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """A name for the result: equal exactly when all that it depends on is.

    Contents count, not times: a file that was copied is found again, and one that changed
    within the clock's tick is not mistaken. Reading is a fraction of tokenising.
    """
    template = transform.template if isinstance(transform, ConversationTransform) else None
    parts = {
        "format": FORMAT,
        "source": request.source,
        "files": [(str(file), _digest(file)) for file in request.files],
        "tokenizer": get_backend(tokenizer).to_str(),
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": template.jinja if template else "",
        "transform": asdict(resolve_settings(request.transform, template)),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(
    request: PrepareRequest, transform: ConversationTransform | PlaintextTransform, folder: Path
) -> None:
    found: list[_Counts] = []
    with publish(folder) as staged:
        with SampleWriter(staged / PART) as writer:
            for index, file in enumerate(request.files):
                counts = _write_file(request, transform, writer, index)
                if counts.num_samples and not counts.num_targets:
                    raise DataError(
                        problem="no token in the whole file is trained",
                        fix="check loss_mask, data.truncation_side and data.max_seq_len",
                        file=str(file),
                    )
                found.append(counts)
        total = _sum(found)
        if not total.num_samples:
            names = ", ".join(map(str, request.files))
            raise DataError(
                problem=f"the data set is empty: {total.num_records} records, "
                f"{total.num_dropped} of them dropped for their length",
                fix="add records, or raise data.max_seq_len",
                file=names,
            )
        info = {
            "source": request.source,
            "files": [str(file) for file in request.files],
            "parts": [PART],
            "counts": asdict(total),
        }
        (staged / INFO).write_text(json.dumps(info), encoding="utf-8")


def _write_file(
    request: PrepareRequest,
    transform: ConversationTransform | PlaintextTransform,
    writer: SampleWriter,
    index: int,
) -> _Counts:
    counts = _Counts()
    records = read_jsonl(request.files[index], source=request.source)
    for batch in _batched(records, RECORDS_PER_BATCH):
        if not counts.num_records:
            transform.check(batch[0])
        outcome = transform.encode(batch)
        counts.num_records += len(batch)
        counts.num_truncated += outcome.num_truncated
        counts.num_dropped += outcome.num_dropped
        for sample in (sample for samples in outcome.samples for sample in samples):
            counts.add(sample)
            writer.write(sample, file=index)
    return counts


def _sum(counts: list[_Counts]) -> _Counts:
    names = [field.name for field in fields(_Counts)]
    return _Counts(**{name: sum(getattr(c, name) for c in counts) for name in names})


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _digest(file: Path) -> str:
    with open_data(file) as data:
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
