"""Positions of a packed row in models whose images have rows and columns (M-RoPE)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from omnilit.models.families.towers import VIDEOS_AS_IMAGES
from omnilit.types import MicroBatch

TYPES_NAME: Final = "mm_token_type_ids"
MODALITY: Final = "moe_mm_token_type_ids"  # the same, for experts that see or read
METHOD: Final = "get_rope_index"
_AXES: Final = 3  # at least: time, height and width
TYPES: Final[Mapping[str, int]] = {"image": 1, "video": 2}
# Sizes of images in patches: with a number of frames in front, which tells how many places they
# have, or without
_GRIDS: Final[Mapping[str, str]] = {"image": "image_grid_thw", "video": "video_grid_thw"}
_SIDES: Final[Mapping[str, str]] = {"image": "target_sizes", "video": "target_sizes_videos"}
# Under which names models take the seconds between a video's frames, in `forward` and by `METHOD`
SECONDS: Final = ("second_per_grid_ts", "video_second_per_grid", "second_per_grids")
SOUND_MASK: Final = "feature_attention_mask"
TRACK: Final = "use_audio_in_video"
_STARTS: Final = ("vision_start_token_id", "audio_start_token_id")


def placeholder_id(config: PreTrainedConfig, kind: str) -> int | None:
    """The token whose place a feature takes; None where the model has no such kind of media."""
    if kind == "video" and config.model_type in VIDEOS_AS_IMAGES:
        kind = "image"
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found: int | None = getattr(config, name, None)
        if found is not None:
            return found
    return None


def is_place(
    config: PreTrainedConfig, media: Mapping[str, Tensor], ids: Tensor, kind: str, start: int = 0
) -> Tensor:
    """Which tokens the features of one kind of media take the places of.

    Args:
        config: Of the base model.
        media: Of the whole row.
        ids: Of its tokens from `start` on, int64 [T].
        kind: One of `MODALITIES`.
        start: Where in the row `ids` begin.

    Returns:
        bool [T].
    """
    token = placeholder_id(config, kind)
    if kind in TYPES and config.model_type in VIDEOS_AS_IMAGES and TYPES_NAME in media:
        return token_types(config, media, ids, start) == TYPES[kind]
    return torch.zeros_like(ids).bool() if token is None else ids == token


def token_types(
    config: PreTrainedConfig, media: Mapping[str, Tensor], ids: Tensor, start: int = 0
) -> Tensor:
    """Of what kind tokens are: their number in `TYPES`, 0 for text; arguments as `is_place`'s.

    Returns:
        int64 [T], as the processor says it, else by the places.
    """
    if TYPES_NAME in media:
        types = media[TYPES_NAME][0, start : start + len(ids)]
        return pad(types, (0, len(ids) - len(types)))  # a row may have got padding since
    types = torch.zeros_like(ids)
    for kind, number in TYPES.items():
        types[is_place(config, media, ids, kind, start)] = number
    return types


def has_rope_positions(base: PreTrainedModel) -> bool:
    """Whether positions of a model have three numbers, and its own code knows which."""
    return hasattr(base, METHOD)


def rope_positions(base: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Several numbers a token, by the model's own code, one sequence at a time.

    Args:
        base: Has the method; its weights are not looked at.
        batch: A whole row, with its media.

    Returns:
        int64 [A, 1, T], of three numbers or as many as that code gives; sequences without media,
        and padding, count in all of them alike.
    """
    reader = _SegmentReader(base, batch)
    parts = []
    for start, end in pairwise(batch.bounds):
        ids = batch.input_ids[:, start:end]
        parts.append(reader.positions(ids, batch.position_ids[:, start:end], start))
    num_axes = max(_AXES, *map(len, parts))
    return torch.cat([part.expand(num_axes, -1, -1) for part in parts], dim=-1)


def _num_runs(mask: Tensor) -> int:
    """How many runs of True a mask [T] has."""
    return int((mask.int().diff(prepend=mask.new_zeros(1).int()) == 1).sum())


class _SegmentReader:
    """Goes through the sequences of a row and their media together."""

    def __init__(self, base: PreTrainedModel, batch: MicroBatch) -> None:
        self._base = base
        self._media = batch.media
        self._known = inspect.signature(getattr(base, METHOD)).parameters
        self._used = dict.fromkeys((*TYPES, "audio"), 0)

        self._grids = _SIDES if _SIDES["image"] in self._known else _GRIDS
        self._by_runs = {
            kind
            for kind, name in self._grids.items()
            if name in self._media
            and not self._is_counted(name, self._is_place(batch.input_ids, kind))
        }

    def _is_counted(self, name: str, mask: Tensor) -> bool:
        """Whether sizes say how many places there are; some models add the ends of lines."""
        return self._grids is _GRIDS and int(mask.sum()) == sum(
            map(self._num_places, self._media[name])
        )

    def _num_places(self, grid: Tensor) -> int:
        return int(grid.prod()) // self._base.config.vision_config.spatial_merge_size**2

    def positions(self, ids: Tensor, plain: Tensor, start: int) -> Tensor:
        """Of one sequence [1, n] that begins at `start`; `plain` are its positions as text."""
        sounds = self._take_sounds(ids)
        parts = {kind: self._take_grids(ids, kind, start) for kind in self._grids}
        given: dict[str, Any] = {
            self._grids[kind]: self._media[self._grids[kind]][part]
            for kind, part in parts.items()
            if part is not None
        }
        if not given:  # the model's own code counts then, too
            return plain[None]
        if sounds is not None:
            given["audio_seqlens"] = sounds
        if self._has_track(ids):
            given[TRACK] = True
        if TYPES_NAME in self._known:
            given[TYPES_NAME] = token_types(self._base.config, self._media, ids[0], start)[None]
        else:
            given["attention_mask"] = torch.ones_like(ids)
        found, _ = getattr(self._base, METHOD)(ids, **given, **self._seconds(parts["video"]))
        return found

    def _take_grids(self, ids: Tensor, kind: str, start: int) -> slice | None:
        """Which grids have their features in this sequence."""
        grids, mask = self._media.get(self._grids[kind]), self._is_place(ids, kind, start)
        left = int(mask.sum())
        if grids is None or not left:
            return None
        first = end = self._used[kind]
        if kind in self._by_runs:
            end += _num_runs(mask)
            left = 0
        while left > 0:
            left -= self._num_places(grids[end])
            end += 1
        self._used[kind] = end
        return slice(first, end)

    def _has_track(self, ids: Tensor) -> bool:
        """Whether the sequence has videos with their sound, whose places are within those."""
        starts = [getattr(self._base.config, name, None) for name in _STARTS]
        if TRACK not in self._known or None in starts:
            return False
        video, sound = starts
        return bool(((ids[0, :-1] == video) & (ids[0, 1:] == sound)).any())

    def _take_sounds(self, ids: Tensor) -> Tensor | None:
        """The numbers of frames of the sequence's sounds, each of which has a token in front."""
        mask, start = self._media.get(SOUND_MASK), getattr(self._base.config, _STARTS[1], None)
        number = 0 if start is None else int((ids == start).sum())
        if mask is None or not number:
            return None
        first = self._used["audio"]
        self._used["audio"] = first + number
        return mask[first : first + number].sum(-1)

    def _is_place(self, ids: Tensor, kind: str, start: int = 0) -> Tensor:
        return is_place(self._base.config, self._media, ids[0], kind, start)

    def _seconds(self, videos: slice | None) -> dict[str, Tensor]:
        """What each frame of these videos stands for, where that is known."""
        given = next((self._media[name] for name in SECONDS if name in self._media), None)
        name = next((name for name in SECONDS if name in self._known), None)
        return {} if videos is None or given is None or name is None else {name: given[videos]}
