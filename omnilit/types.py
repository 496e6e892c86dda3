"""What flows between the packages: records, samples, micro-batches, loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORE: Final = -100  # the label of a token that is not supervised
TOKENS: Final = "tokens"  # the count of supervised tokens
WEIGHT: Final = "weight"  # the sum of their weights
PAIRS: Final = "pairs"  # the count of preference pairs
OF_SOURCE: Final = "tokens/"  # with a source's name behind it, the count of its tokens
# What a model takes of each kind of medium, under the names of transformers
MODALITIES: Final[Mapping[str, str]] = MappingProxyType(
    {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
)
Grid = tuple[int, int, int]  # of an image or video: frames, rows and columns of patches


def grid_name(kind: str) -> str:
    """What transformers calls the grids of a kind of media, int64 [N, 3]."""
    return f"{kind}_grid_thw"


class Origin(NamedTuple):
    """Where a record came from; it stays with the record through packing to the step.

    Args:
        source: Name of the data source.
        file: Path of the file it was read from.
        row: 1-based line or row in that file.
    """

    source: str
    file: str
    row: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in a file."""

    fields: Mapping[str, Any]
    origin: Origin


class Medium(NamedTuple):
    """One image, video or sound of a record.

    Args:
        kind: A key of `MODALITIES`.
        path: Its file, relative to the record's, or its address; empty where there is none.
        data: Its bytes, where the record holds them or they came from the net.
        frames: The images of a video that is given as such, in order.
        fps: How many of them make a second, where the record says it.
        plan: What was decided about it when the text was written, as JSON: its size, the frames
            that are taken of a video.
        num_tokens: Places that it has in the text of its sample.
    """

    kind: str
    path: str = ""
    data: bytes | None = None
    frames: tuple[Medium, ...] = ()
    fps: float | None = None
    plan: str = ""
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised sequence, never longer than `max_seq_len`.

    Args:
        input_ids: Token ids, int32 [T].
        labels: The same ids where supervised, else IGNORE; not shifted; int32 [T].
        origin: The record it came from.
        weights: How much each label counts, float32 [T]; None where all count 1.
        pair_start: Where the second of two sequences begins (the rejected answer of a
            preference pair); positions restart there. None for one sequence.
        media: What its text has places for, in the order of these.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    origin: Origin
    weights: npt.NDArray[np.float32] | None = None
    pair_start: int | None = None
    media: tuple[Medium, ...] = ()

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class StepStamp:
    """What every micro-batch of a step knows about its whole step.

    Args:
        counts: Targets of each loss term, over all micro-batches of the step on all ranks.
        num_tokens: Real tokens (no filling) of the step on all ranks.
        index: This micro-batch's place in the window, 0-based.
        size: Micro-batches in the window.
        data_wait_s: Seconds this rank waited for the window.
        media: The `MODALITIES` that the micro-batch of any data rank has at this place.
        grids: By kind, what the micro-batch of each data rank has of it at this place; kinds that
            no rank has are left out. None where nobody asked.
    """

    counts: Mapping[str, float]
    num_tokens: int
    index: int
    size: int
    data_wait_s: float = 0.0
    media: frozenset[str] = frozenset()
    grids: Mapping[str, Sequence[Sequence[Grid]]] | None = None


class RowCounts(NamedTuple):
    """How many rows of a tensor go from this rank to each rank of a group, and come from each."""

    sent: tuple[int, ...]
    received: tuple[int, ...]


class TowerWork(NamedTuple):
    """What the vision tower has to do for one micro-batch of the ranks that share the work.

    Counted in pairs of patches that attend to each other, summed over kinds of media.

    Args:
        before: Of the busiest rank, if each looked at what its own row has.
        after: Of the busiest rank, as it is.
        even: Of each rank, if all did alike.
    """

    before: int
    after: int
    even: float


@dataclass(frozen=True, slots=True)
class MediaRoute:
    """Where one kind of media of a micro-batch is looked at, and the way of its features back.

    Pixels go to data ranks by `pixels`; features come back from them by `features`, are put in
    `order`, and go to the ranks that share the row by `spread`, where `own` puts them in order.

    Args:
        order: Which rows of features are kept, int64 [R].
        grids: Of what the tower looks at here, int64 [N, 3], N may be 0; None for what the row has.
        pixels: Rows of patches, over the data ranks; None where they stay.
        features: Rows of features, over the data ranks.
        spread: Rows of features, over the ranks that share the row; None where they stay.
        own: Which of the rows that came by `spread` are kept, int64 [R].
    """

    order: Tensor
    grids: Tensor | None = None
    pixels: RowCounts | None = None
    features: RowCounts | None = None
    spread: RowCounts | None = None
    own: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> MediaRoute:
        """The same route with its tensors changed."""
        return replace(
            self,
            order=change(self.order),
            grids=None if self.grids is None else change(self.grids),
            own=None if self.own is None else change(self.own),
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences without padding: one row, with the bounds of its segments.

    Args:
        input_ids: int64 [1, T].
        labels: int64 [1, T], shifted: `labels[0, t]` is what position t predicts, IGNORE where
            nothing is trained and at the last token of every segment. Of data with classes, that
            last token has the segment's class, and no other token a label.
        position_ids: int64 [1, T], restarting at 0 in every segment.
        bounds: Ends of the segments, [0, ..., T]; a list, so no kernel waits for a device.
        origins: One a segment of data, none for padding; empty for a label-free micro-batch
            that fills a last window.
        counts: Targets of each loss term in this micro-batch: `tokens`, which are the classes
            where the data has such; `weight`, the sum of
            their weights, where the data has any; `pairs` of preference data, whose segments are
            the chosen and the rejected answers in turn; `tokens/NAME` for each of several sources.
        stamp: The step it belongs to; None in evaluation.
        weights: float32 [1, T], shifted like the labels; None where every label counts 1.
        num_padding: Tokens at the end that are no data, in a segment of their own.
        row_index: Where in the row of `bounds` each token stands, int64 [1, T]; None where this
            rank holds the whole row. Else tensors and counts are of this rank's part, and bounds,
            origins and padding of the whole.
        media: What the model takes beside tokens, under the names of its `forward`
            (`pixel_values`, `image_grid_thw`), as its processor gives it, of all segments in
            order; whole on every rank of a row, but pixels that have a route. Empty for text.
        routes: By kind, where media are looked at and how features get to their tokens. A kind
            without one is looked at where its row is.
        tower_work: How much there is to look at, where ranks share that work.
        media_flops: Operations of training that media of the whole row cost their towers; None
            where they are not counted.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    bounds: list[int]
    origins: tuple[Origin, ...]
    counts: Mapping[str, float]
    stamp: StepStamp | None = None
    weights: Tensor | None = None
    num_padding: int = 0
    row_index: Tensor | None = None
    media: Mapping[str, Tensor] = field(default_factory=dict)
    routes: Mapping[str, MediaRoute] = field(default_factory=dict)
    tower_work: TowerWork | None = None
    media_flops: float | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens of the whole row: 0 for a micro-batch that only fills a window."""
        return self.bounds[-1] - self.num_padding if self.origins else 0

    @property
    def modalities(self) -> frozenset[str]:
        """The kinds of media in it."""
        return frozenset(kind for kind, name in MODALITIES.items() if name in self.media)

    @property
    def grids(self) -> dict[str, tuple[Grid, ...]]:
        """By kind, what its images and videos measure, of models that say it; on the CPU."""
        found = {kind: self.media.get(grid_name(kind)) for kind in MODALITIES}
        return {
            kind: tuple((int(frames), int(rows), int(columns)) for frames, rows, columns in grids)
            for kind, tensor in found.items()
            if tensor is not None
            for grids in [tensor.tolist()]
        }

    @property
    def num_parts(self) -> int:
        """Ranks that share the row."""
        return self.bounds[-1] // self.input_ids.shape[1]

    @property
    def is_real(self) -> Tensor | None:
        """True for the tokens [T] that are no padding; None where the row has none."""
        if not self.num_padding:
            return None
        places = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        if self.row_index is not None:
            places = self.row_index[0]
        return places < self.bounds[-1] - self.num_padding

    def target_segments(self) -> Tensor:
        """The segment of each supervised token here, by its number in `bounds`; int64 [R]."""
        positions = (self.labels[0] != IGNORE).nonzero()[:, 0]
        if self.row_index is not None:
            positions = self.row_index[0, positions]
        ends = torch.tensor(self.bounds[1:], device=positions.device)
        return torch.bucketize(positions, ends, right=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in page-locked memory; the loader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            weights=None if self.weights is None else change(self.weights),
            row_index=None if self.row_index is None else change(self.row_index),
            media={name: change(tensor) for name, tensor in self.media.items()},
            routes={kind: route.map(change) for kind, route in self.routes.items()},
        )


@dataclass(frozen=True, slots=True)
class StepWindow:
    """All micro-batches that a rank runs in one step: what a pipeline takes at a time.

    Args:
        micro_batches: In order, all of as many tokens.
    """

    micro_batches: tuple[MicroBatch, ...]

    def __iter__(self) -> Iterator[MicroBatch]:
        """The micro-batches."""
        return iter(self.micro_batches)

    def __len__(self) -> int:
        """How many they are."""
        return len(self.micro_batches)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StepWindow:
        """The same micro-batches with their tensors on `device`."""
        return StepWindow(tuple(one.to(device, non_blocking=non_blocking) for one in self))


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One part of the loss of a micro-batch.

    Args:
        sum: Sum over this micro-batch's targets, a scalar with gradient.
        count: The name in `MicroBatch.counts` of the targets that it is a mean over.
        by_token: The loss of each supervised token in order, [R]; what the loss of each data
            source is read from. None for a term that belongs to no token.
        is_trained: False for a number that is only shown: its mean is no part of the loss.
    """

    sum: Tensor
    count: str = "tokens"
    by_token: Tensor | None = None
    is_trained: bool = True


@dataclass(frozen=True, slots=True)
class Confusion:
    """What an evaluation's texts are, and what a classifier took them for.

    Args:
        names: Of the classes by number.
        counts: Texts of each class (row) that were taken for each class (column).
    """

    names: tuple[str, ...]
    counts: list[list[int]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step came to, the same on all ranks.

    Args:
        step: 1-based optimizer step.
        epoch: 0-based.
        losses: Mean of each loss term over the step's targets, before the update.
        loss: Their sum.
        grad_norm: Over all meshes, before clipping; not finite when the step was skipped.
        lr: Learning rate of each group that this step used, in the order of the groups.
        tokens: Supervised tokens of the step on all ranks.
        num_tokens: Real tokens of the step on all ranks.
        data_wait_s: Seconds this rank waited for data.
        skipped_steps: Steps skipped for a non-finite norm so far.
        source_tokens: Supervised tokens of the step by data source, where there are several.
        source_losses: Mean loss of these tokens, of sources that have any in this step.
        flops: Operations of the step on all ranks, see `models.flops`; None where not known.
        shown: Numbers that a task shows beside its loss.
    """

    step: int
    epoch: int
    losses: Mapping[str, float]
    loss: float
    grad_norm: float
    lr: Mapping[str, float]
    tokens: int
    num_tokens: int
    data_wait_s: float
    skipped_steps: int
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    source_losses: Mapping[str, float] = field(default_factory=dict)
    flops: float | None = None
    shown: Mapping[str, float] = field(default_factory=dict)
