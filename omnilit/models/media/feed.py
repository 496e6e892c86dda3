"""Images, videos and sounds of packed rows on their way through a model of transformers.

Its own forward runs the towers and puts what they give in the place of tokens. What comes between
is done where it asks for features: ranks that share the work of a tower trade what it looks at and
what it gives, a rank that has nothing to look at runs it on something tiny while others do, and of
a row that is split over ranks each takes what belongs to the tokens there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
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
from omnilit.models.families.towers import VIDEOS_AS_IMAGES
from omnilit.models.media.blank import blank_media
from omnilit.models.media.fit import BALANCE, feature_fields, refuse_unfeedable
from omnilit.models.media.plan import plan_towers
from omnilit.models.media.ranks import MediaRanks
from omnilit.models.media.rope_positions import (
    MODALITY,
    TYPES,
    TYPES_NAME,
    has_rope_positions,
    is_place,
    rope_positions,
    token_types,
)
from omnilit.models.media.routes import RowPlaces, build_route
from omnilit.models.model_mask import TYPES_NAMES, sees_ahead
from omnilit.models.towers import base_of, features_name, grid_kinds, media_kinds
from omnilit.parallel.sequence import pad_row
from omnilit.types import MODALITIES, Grid, MediaRoute, MicroBatch, TowerWork, grid_name

POSITIONS: Final = "position_ids"  # in the media of a prepared row: int64 [A, 1, T]
_LEVELS: Final = "deepstack_features"  # of further layers of a tower


class MediaFeed:
    """Gives one model the media of its rows.

    Args:
        model: Only this instance is changed.

    Attributes:
        is_shared: Other ranks hold parts of the weights, so towers run on all ranks or on none.
        ranks: Those that share the work of towers, or their rows.
        kinds: What the model takes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unfeedable(model)
        base = base_of(model)
        self.kinds = media_kinds(model)
        self.is_shared = False
        self.ranks = MediaRanks()
        self._base = base
        self._movable = grid_kinds(model)
        self._taken = frozenset(inspect.signature(type(model).forward).parameters)
        self._sees_ahead = sees_ahead(model)
        self._batch: MicroBatch | None = None
        self._blank: frozenset[str] = frozenset()
        self._is_inside = False
        self._fields = {kind: feature_fields(type(base), kind) for kind in self.kinds}
        for kind in self.kinds:
            self._bind(kind)
        if base.config.model_type in VIDEOS_AS_IMAGES:
            self._tell_apart()

    def prepare(self, batch: MicroBatch) -> MicroBatch:
        """Add what is made of a whole row, before it is split over ranks and moved.

        Args:
            batch: On the CPU.

        Raises:
            ConfigError: Data ranks are to share the work, and the loader does not say what each
                of them has.
        """
        batch = pad_row(batch, self.ranks.layout.multiple)  # as it will be split
        return self._with_routes(self._with_positions(batch))

    def _with_positions(self, batch: MicroBatch) -> MicroBatch:
        if not batch.media or not has_rope_positions(self._base):
            return batch
        return replace(batch, media={**batch.media, POSITIONS: rope_positions(self._base, batch)})

    def _with_routes(self, batch: MicroBatch) -> MicroBatch:
        """Choose what is looked at here, and keep the pixels that this rank has a hand in."""
        if not self.ranks.are_several:
            return batch
        media, routes = dict(batch.media), {}
        work = [TowerWork(0, 0, 0.0)]
        for kind in sorted(self.kinds):
            grids = self._shared_grids(kind, batch)
            if grids is None:
                if self.ranks.is_split and kind in batch.modalities:
                    routes[kind] = MediaRoute(order=self._places(kind, batch).own)
                continue
            plan = plan_towers(grids, per_row=self.ranks.layout.num_parts)
            work.append(plan.work)
            blank = blank_media(self._base, kind, device="cpu")
            pixels = batch.media.get(MODALITIES[kind], blank[MODALITIES[kind]][:0])
            routes[kind], kept = build_route(
                grids,
                plan,
                self.ranks.seat(is_alone=len(grids) == 1),
                merged=self._base.config.vision_config.spatial_merge_size**2,
                places=self._places(kind, batch) if self.ranks.is_split else None,
            )
            media[MODALITIES[kind]] = pixels[kept]
        total = TowerWork(*map(sum, zip(*work, strict=True))) if self._movable else None
        return replace(batch, media=media, routes=routes, tower_work=total)

    def _shared_grids(self, kind: str, batch: MicroBatch) -> Sequence[Sequence[Grid]] | None:
        """What the rows have whose ranks share the work; None where this kind is not shared."""
        ranks, stamp = self.ranks, batch.stamp
        if kind not in self._movable:
            return None
        if ranks.data is not None and stamp is not None:  # an evaluation has none
            if stamp.grids is None:
                raise ConfigError(
                    key=BALANCE,
                    problem="the training loader does not say what other ranks have to look at",
                    fix="use OmniDataModule, fill StepStamp.grids, or leave it out",
                )
            return stamp.grids.get(kind)
        own = batch.grids.get(kind)
        return None if own is None or not ranks.is_split else [own]

    def _places(self, kind: str, batch: MicroBatch) -> RowPlaces:
        mask = is_place(self._base.config, batch.media, batch.input_ids[0], kind)
        return RowPlaces.of(mask, self.ranks.layout, batch.bounds, self.ranks.sequence_rank)

    @contextmanager
    def feeding(self, batch: MicroBatch) -> Iterator[dict[str, Tensor]]:
        """What the model's forward is given for a row, for the time of that forward.

        Args:
            batch: Prepared, on the model's device, this rank's part of its row.
        """
        if batch.row_index is None and not batch.routes and POSITIONS not in batch.media:
            batch = self._with_positions(batch)
        self._batch, self._blank = batch, self._lacking(batch)
        given = dict(batch.media)
        positions = given.pop(POSITIONS, None)
        for kind, route in sorted(batch.routes.items()):
            if route.grids is not None:
                name = MODALITIES[kind]
                given[name] = self.ranks.bring_pixels(given[name], route)
                given[grid_name(kind)] = route.grids
        for kind in sorted(self._blank):
            given |= blank_media(self._base, kind, device=batch.input_ids.device)
        inputs = {name: value for name, value in given.items() if name in self._taken}
        inputs.pop(TYPES_NAME, None)  # positions are there already
        if self._sees_ahead:
            types = self._own_types(batch)
            inputs |= {name: types for name in TYPES_NAMES if name in self._taken}
            # without it transformers takes places in a row for places in its sequences, where
            # positions begin anew: blocks of tokens would be looked for at others' places
            inputs["attention_mask"] = torch.ones_like(batch.input_ids)
        if MODALITY in self._taken:
            inputs[MODALITY] = self._own_types(batch)
        if positions is not None:
            own = batch.row_index
            inputs[POSITIONS] = positions if own is None else positions[..., own[0]]
        try:
            yield inputs
        finally:
            self._batch, self._blank = None, frozenset()

    def _lacking(self, batch: MicroBatch) -> frozenset[str]:
        """The kinds of media that another rank may look at here, and this one has none of."""
        if not self.is_shared:
            return frozenset()
        elsewhere = self.kinds if batch.stamp is None else batch.stamp.media & self.kinds
        lent = {k for k, r in batch.routes.items() if r.grids is not None and not len(r.grids)}
        return (elsewhere - batch.modalities) | lent

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
        names = (_filled(output, self._fields[kind]), _LEVELS)
        found = {name: getattr(output, name, None) for name in names}
        levels = {name: _levels(value) for name, value in found.items() if value is not None}
        moved = iter(self._move(kind, [level for each in levels.values() for level in each]))
        for name, each in levels.items():
            setattr(output, name, _as_given(found[name], [next(moved) for _ in each]))
        return output

    def _move(self, kind: str, levels: list[Tensor]) -> list[Tensor]:
        """From what the tower gave here to the features of this rank's tokens."""
        assert self._batch is not None
        route = self._batch.routes.get(kind)
        if kind in self._blank:  # nothing of it counts
            levels = [_rows(level)[:0] for level in levels]
        if route is None:
            return [level.clone() for level in levels]
        return self.ranks.bring_features([_rows(level) for level in levels], route)

    def _own_types(self, batch: MicroBatch) -> Tensor:
        """Of what kind each token here is, int64 [1, T]."""
        types, own = batch.media.get(TYPES_NAME), batch.row_index
        if types is None or own is None:
            return token_types(self._base.config, batch.media, batch.input_ids[0])[None]
        # of the whole row, which got padding since
        return pad(types, (0, batch.bounds[-1] - types.shape[-1]))[..., own[0]]

    def _tell_apart(self) -> None:
        """Let types say which places are whose where images and videos have one token."""
        feed = self
        name = "get_placeholder_mask"
        own: Callable[..., Any] = getattr(self._base, name)

        def masks(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if feed._batch is None:
                return own(*args, **kwargs)
            types = feed._own_types(feed._batch)[..., None]
            return types == TYPES["image"], types == TYPES["video"]

        setattr(self._base, name, MethodType(masks, self._base))


def feature_rows(base: PreTrainedModel, kind: str, output: Any) -> int:
    """How many places features take, as a model's own code gave them."""
    field = _filled(output, feature_fields(type(base), kind))
    return sum(len(_rows(level)) for level in _levels(getattr(output, field)))


def _filled(output: Any, fields: Sequence[str]) -> str:
    return next(name for name in fields if getattr(output, name, None) is not None)


def _rows(features: Tensor) -> Tensor:
    return features.reshape(-1, features.shape[-1])


def _is_nested(value: object) -> bool:
    """Whether features come in levels, each with one part an image."""
    return isinstance(value, list) and (not value or isinstance(value[0], Sequence))


def _levels(value: Any) -> list[Tensor]:
    """Features as one tensor a level; parts, one an image, are put together."""
    if isinstance(value, Tensor):
        return [value]
    parts = value if _is_nested(value) else [value]
    return [torch.cat([_rows(part) for part in level]) for level in parts]


def _as_given(value: Any, levels: list[Tensor]) -> Any:
    """The inverse of `_levels`, with one part in all.

    A tensor has as many dimensions as it had: models flatten the first ones, or go through them.
    """
    if isinstance(value, Tensor):
        (level,) = levels
        more = value.ndim - level.ndim
        return level.reshape(*[1] * more, *level.shape) if more else level
    return [(level,) for level in levels] if _is_nested(value) else (levels[0],)
