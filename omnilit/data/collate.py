"""From samples to a packed micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from omnilit.data.media.load import load_media, token_types
from omnilit.data.media.processor import MediaProcessor
from omnilit.errors import DataError
from omnilit.registry import Registry
from omnilit.types import IGNORE, OF_SOURCE, PAIRS, TOKENS, WEIGHT, MicroBatch, Origin, Sample

NUM_FILLER_TOKENS = 2
COLLATORS: Final = Registry("data.collator")


@dataclass(frozen=True, slots=True)
class CollateSettings:
    """What a micro-batch holds beside its tokens.

    Args:
        pad_to: Tokens that every micro-batch is padded to; None leaves it as it is.
        sources: Names of the data sources to count tokens of; none where there is one only.
        has_weights: Carry the weights of labels.
        collator: Makes the micro-batch in place of `collate`.
        has_pairs: Samples are preference pairs, which are counted.
        has_classes: The label of a sample is its class, and stands at its last token, unshifted.
        media: Reads images, videos and sounds; None for a model of text.
        is_silent: Samples whose media cannot be read are left out.
    """

    pad_to: int | None = None
    sources: tuple[str, ...] = ()
    has_weights: bool = False
    collator: Collator | None = None
    has_pairs: bool = False
    has_classes: bool = False
    media: MediaProcessor | None = None
    is_silent: bool = False


# Samples of one micro-batch, none for one that only fills a window, and what it must hold
Collator: TypeAlias = Callable[[Sequence[Sample], CollateSettings], MicroBatch]
PLAIN: Final = CollateSettings()


def make_batch(samples: Sequence[Sample], settings: CollateSettings = PLAIN) -> MicroBatch:
    """The micro-batch of some samples, by the user's own collator where there is one.

    Raises:
        DataError: The collator gives something else than a micro-batch.
    """
    if settings.collator is None:
        return collate(samples, settings)
    batch = settings.collator(samples, settings)
    if isinstance(batch, MicroBatch):
        return batch
    raise DataError(
        problem=f"data.collator gave a {type(batch).__name__}, not a MicroBatch",
        fix="return what omnilit.data.collate.collate gives, or the same with other fields",
    )


def collate(samples: Sequence[Sample], settings: CollateSettings = PLAIN) -> MicroBatch:
    """Pack samples one after another, without padding unless it is asked for.

    Labels are shifted within each sequence: position t predicts token t + 1, and the last
    position nothing, so that no sequence is trained to foresee the next. Classes stay where they
    are. Padding is a segment of its own at the end, without labels.

    Args:
        samples: None of them empty. One with `pair_start` is two sequences. No samples at all
            give a `filler`.
        settings: Padding, counts, weights and media.

    Raises:
        DataError: A medium cannot be read.
    """
    if not samples:
        return filler(settings)
    lengths = [size for sample in samples for size in _sequence_lengths(sample)]
    bounds = np.cumsum(lengths)
    input_ids = np.concatenate([s.input_ids for s in samples]).astype(np.int64)
    labels = np.concatenate([s.labels for s in samples]).astype(np.int64)
    if not settings.has_classes:
        labels = np.append(labels[1:], IGNORE)
        labels[bounds - 1] = IGNORE
    weights = _shifted_weights(samples) if settings.has_weights else None
    is_label = labels != IGNORE
    counts: dict[str, float] = {TOKENS: int(is_label.sum())}
    if weights is not None:
        counts[WEIGHT] = float(weights[is_label].sum(dtype=np.float64))
    if settings.has_pairs:
        counts[PAIRS] = sum(s.pair_start is not None for s in samples)
    counts |= _count_sources(samples, is_label, settings.sources)
    num_padding = 0 if settings.pad_to is None else settings.pad_to - len(input_ids)
    assert num_padding >= 0, "a micro-batch never holds more than its budget"
    lengths += [num_padding] * (num_padding > 0)
    batch = _build(
        (input_ids, labels, weights),
        lengths,
        num_padding,
        origins=tuple(s.origin for s in samples for _ in _sequence_lengths(s)),
        counts=counts,
    )
    return _with_media(batch, samples, settings)


def filler(settings: CollateSettings = PLAIN) -> MicroBatch:
    """A micro-batch without labels or origins, where a rank has none in a last window.

    It has tokens, so that a rank runs the same collectives as the others.
    """
    size = NUM_FILLER_TOKENS if settings.pad_to is None else settings.pad_to
    counts: dict[str, float] = {TOKENS: 0}
    if settings.has_weights:
        counts[WEIGHT] = 0.0
    if settings.has_pairs:
        counts[PAIRS] = 0
    counts |= {OF_SOURCE + name: 0 for name in settings.sources}
    labels = np.full(size, IGNORE, np.int64)
    weights = np.zeros(size, np.float32) if settings.has_weights else None
    columns = (np.zeros(size, np.int64), labels, weights)
    return _with_media(_build(columns, [size], 0, origins=(), counts=counts), (), settings)


def _with_media(
    batch: MicroBatch, samples: Sequence[Sample], settings: CollateSettings
) -> MicroBatch:
    if settings.media is None:
        return batch
    media = load_media(samples, settings.media)
    types = token_types(batch.input_ids[0].numpy(), settings.media, has_media=bool(media))
    return replace(batch, media={**media, **types})


def _build(
    columns: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32] | None],
    lengths: list[int],
    num_padding: int,
    *,
    origins: tuple[Origin, ...],
    counts: dict[str, float],
) -> MicroBatch:
    input_ids, labels, weights = columns
    if num_padding:
        input_ids = np.pad(input_ids, (0, num_padding))
        labels = np.pad(labels, (0, num_padding), constant_values=IGNORE)
        weights = None if weights is None else np.pad(weights, (0, num_padding))
    position_ids = np.concatenate([np.arange(size, dtype=np.int64) for size in lengths])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        bounds=[0, *np.cumsum(lengths).tolist()],
        origins=origins,
        counts=counts,
        weights=None if weights is None else torch.from_numpy(weights)[None],
        num_padding=num_padding,
    )


def _sequence_lengths(sample: Sample) -> tuple[int, ...]:
    if sample.pair_start is None:
        return (len(sample),)
    return (sample.pair_start, len(sample) - sample.pair_start)


def _shifted_weights(samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
    ones = (np.ones(len(s), np.float32) if s.weights is None else s.weights for s in samples)
    return np.append(np.concatenate(list(ones))[1:], np.float32(0))


def _count_sources(
    samples: Sequence[Sample], is_label: npt.NDArray[np.bool_], sources: tuple[str, ...]
) -> dict[str, float]:
    if not sources:
        return {}
    found = dict.fromkeys((OF_SOURCE + name for name in sources), 0.0)
    end = 0
    for sample in samples:
        start, end = end, end + len(sample)
        found[OF_SOURCE + sample.origin.source] += int(is_label[start:end].sum())
    return found
