"""Images, videos and sounds of packed rows on their way through a model of transformers.

Its own forward runs the towers and puts what they give in the place of tokens. What comes between
is done where it asks for features: a rank whose row has none of a kind that another rank has runs
the tower on something tiny, and of a row that is split over ranks it takes what belongs to the
tokens here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from omnilit.errors import ConfigError
from omnilit.models.attention import BOUNDS
from omnilit.models.blank_media import blank_media
from omnilit.models.rope_positions import (
    TYPES_NAME,
    has_rope_positions,
    placeholder_id,
    rope_positions,
)
from omnilit.models.towers import base_of, features_name, media_kinds
from omnilit.types import MicroBatch

POSITIONS: Final = "position_ids"  # in the media of a prepared row: int64 [3, 1, T]
ROW_IDS: Final = "row_ids"  # likewise: the tokens of the whole row, where ranks share it
# What features are called in what a model's own code gives, one row a place
_FEATURES: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("pooler_output", "deepstack_features"),
    "video": ("pooler_output", "deepstack_features"),
    "audio": ("pooler_output", "last_hidden_state"),
}


class MediaFeed:
    """Gives one model the media of its rows.

    Args:
        model: Only this instance is changed.

    Attributes:
        is_shared: Other ranks hold parts of the weights, so towers run on all ranks or on none.
        kinds: What the model takes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unfeedable(model)
        base = base_of(model)
        self.kinds = media_kinds(model)
        self.is_shared = False
        self._base = base
        self._taken = frozenset(inspect.signature(type(model).forward).parameters)
        self._batch: MicroBatch | None = None
        self._blank: frozenset[str] = frozenset()
        self._is_inside = False
        for kind in self.kinds:
            self._bind(kind)

    def prepare(self, batch: MicroBatch, *, is_split: bool) -> MicroBatch:
        """Add what is made of a whole row, before it is split over ranks and moved.

        Args:
            batch: On the CPU.
            is_split: Whether it will be split.
        """
        if not batch.media:
            return batch
        more: dict[str, Tensor] = {}
        if has_rope_positions(self._base):
            more[POSITIONS] = rope_positions(self._base, batch)
        if is_split:
            more[ROW_IDS] = batch.input_ids
        return replace(batch, media={**batch.media, **more})

    @contextmanager
    def feeding(self, batch: MicroBatch) -> Iterator[dict[str, Tensor]]:
        """What the model's forward is given for a row, for the time of that forward.

        Args:
            batch: Prepared, on the model's device, this rank's part of its row.
        """
        is_whole = batch.row_index is None
        if batch.media and is_whole and POSITIONS not in batch.media:
            batch = self.prepare(batch, is_split=False)
        self._batch, self._blank = batch, self._lacking(batch)
        given = dict(batch.media)
        positions = given.pop(POSITIONS, None)
        for kind in sorted(self._blank):
            given |= blank_media(self._base, kind, device=batch.input_ids.device)
        inputs = {name: value for name, value in given.items() if name in self._taken}
        inputs.pop(TYPES_NAME, None)  # positions are there already
        if positions is not None:
            inputs[POSITIONS] = _own_columns(positions, batch)
        try:
            yield inputs
        finally:
            self._batch, self._blank = None, frozenset()

    def _lacking(self, batch: MicroBatch) -> frozenset[str]:
        """The kinds of media that another rank may have here, and this one has not."""
        if not self.is_shared:
            return frozenset()
        elsewhere = self.kinds if batch.stamp is None else batch.stamp.media & self.kinds
        return elsewhere - batch.modalities

    def _bind(self, kind: str) -> None:
        name = features_name(kind)
        own: Callable[..., Any] = getattr(self._base, name)
        feed = self

        def features(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop(BOUNDS, None)  # of the row of tokens
            if feed._batch is None or feed._is_inside:  # videos may go through images
                return own(*args, **kwargs)
            feed._is_inside = True
            try:
                output = own(*args, **kwargs)
            finally:
                feed._is_inside = False
            return feed._own_features(kind, output)

        setattr(self._base, name, MethodType(features, self._base))

    def _own_features(self, kind: str, output: Any) -> Any:
        """Keep the rows whose places are here, which leaves a graph to all of them.

        What comes is put together anew in any case: some models return it, and FSDP2 warns of a
        view as its unit's output.
        """
        rows = self._own_rows(kind)
        for name in _FEATURES[kind]:
            value = getattr(output, name, None)
            if value is not None:
                kept = [_pick(v, rows) for v in value] if _is_nested(value) else _pick(value, rows)
                setattr(output, name, kept)
        return output

    def _own_rows(self, kind: str) -> Tensor | None:
        """Which features belong to tokens of this rank; None for all."""
        batch = self._batch
        assert batch is not None
        if kind in self._blank:
            return torch.empty(0, dtype=torch.int64, device=batch.input_ids.device)
        if batch.row_index is None:
            return None
        token = placeholder_id(self._base.config, kind)
        is_place = _of_whole_row(batch.media[ROW_IDS], batch)[0] == token
        own = batch.row_index[0]
        return (is_place.cumsum(0) - 1)[own[is_place[own]]]


def refuse_unfeedable(model: PreTrainedModel) -> None:
    """Stop before a model whose media do not take the place of tokens.

    Raises:
        ConfigError: With the reason.
    """
    base = base_of(model)
    source = inspect.getsource(inspect.unwrap(type(base).forward))
    reason = ""
    if not media_kinds(model):
        reason = "it has no get_image_features to ask for them"
    elif "masked_scatter" not in source:
        reason = "its media do not take the place of tokens"
    elif "block_sequence_ids" in source or "token_type_ids=token_type_ids" in source:
        reason = "tokens of an image see those behind them, and packed attention has no such mask"
    if reason:
        raise ConfigError(
            key="model.config_path",
            problem=f"{type(model).__name__} cannot be trained on media in packed rows: {reason}",
            fix="choose another model, or train its text with model.class_path: SFTModule",
        )


def _is_nested(value: object) -> bool:
    """Whether features come in levels, each with one part an image."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Sequence)


def _pick(value: Tensor | Sequence[Tensor], rows: Tensor | None) -> Tensor | tuple[Tensor]:
    """Rows of features [..., H], or all, which may come in one part an image."""
    if isinstance(value, Tensor):
        return value.clone() if rows is None else value.reshape(-1, value.shape[-1])[rows]
    whole = torch.cat([part.reshape(-1, part.shape[-1]) for part in value])
    return (whole if rows is None else whole[rows],)


def _of_whole_row(values: Tensor, batch: MicroBatch) -> Tensor:
    """Values [..., T] of a row that may have got padding since."""
    return pad(values, (0, batch.bounds[-1] - values.shape[-1]))


def _own_columns(values: Tensor, batch: MicroBatch) -> Tensor:
    whole = _of_whole_row(values, batch)
    return whole if batch.row_index is None else whole[..., batch.row_index[0]]
