"""Positions of a packed row in models whose images have rows and columns (M-RoPE)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from omnilit.types import MicroBatch

TYPES_NAME: Final = "mm_token_type_ids"
METHOD: Final = "get_rope_index"
_TYPES: Final[Mapping[str, int]] = {"image": 1, "video": 2}
_GRIDS: Final[Mapping[str, str]] = {"image": "image_grid_thw", "video": "video_grid_thw"}
# Under which names models take the seconds between a video's frames, in `forward` and by `METHOD`
_SECONDS: Final = ("second_per_grid_ts", "video_second_per_grid", "second_per_grids")
_SOUND_MASK: Final = "feature_attention_mask"
TRACK: Final = "use_audio_in_video"
_STARTS: Final = ("vision_start_token_id", "audio_start_token_id")


def placeholder_id(config: PreTrainedConfig, kind: str) -> int | None:
    """The token whose place a feature takes; None where the model has no such kind of media."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found: int | None = getattr(config, name, None)
        if found is not None:
            return found
    return None


def has_rope_positions(base: PreTrainedModel) -> bool:
    """Whether positions of a model have three numbers, and its own code knows which."""
    return hasattr(base, METHOD)


def rope_positions(base: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Three numbers a token, by the model's own code, one sequence at a time.

    Args:
        base: Has the method; its weights are not looked at.
        batch: A whole row, with its media.

    Returns:
        int64 [3, 1, T]; sequences without media, and padding, count in all three alike.
    """
    reader = _SegmentReader(base, batch)
    parts = []
    for start, end in pairwise(batch.bounds):
        ids = batch.input_ids[:, start:end]
        parts.append(reader.positions(ids, batch.position_ids[:, start:end], start))
    return torch.cat(parts, dim=-1)


class _SegmentReader:
    """Goes through the sequences of a row and their media together."""

    def __init__(self, base: PreTrainedModel, batch: MicroBatch) -> None:
        self._base = base
        self._media = batch.media
        self._known = inspect.signature(getattr(base, METHOD)).parameters
        self._used = dict.fromkeys((*_TYPES, "audio"), 0)

    def positions(self, ids: Tensor, plain: Tensor, start: int) -> Tensor:
        """Of one sequence [1, n] that begins at `start`; `plain` are its positions as text."""
        sounds = self._take_sounds(ids)
        parts = {kind: self._take_grids(ids, kind) for kind in _GRIDS}
        given: dict[str, Any] = {
            _GRIDS[kind]: self._media[_GRIDS[kind]][part]
            for kind, part in parts.items()
            if part is not None
        }
        if not given:  # the model's own code counts then, too
            return plain.expand(3, 1, -1)
        if sounds is not None:
            given["audio_seqlens"] = sounds
        if self._has_track(ids):
            given[TRACK] = True
        if TYPES_NAME in self._known:
            given[TYPES_NAME] = self._token_types(ids, start)
        else:
            given["attention_mask"] = torch.ones_like(ids)
        found, _ = getattr(self._base, METHOD)(ids, **given, **self._seconds(parts["video"]))
        return found

    def _take_grids(self, ids: Tensor, kind: str) -> slice | None:
        """Which grids have their features in this sequence."""
        grids, is_place = self._media.get(_GRIDS[kind]), self._is_place(ids, kind)
        left = int(is_place.sum())
        if grids is None or not left:
            return None
        first = end = self._used[kind]
        merged = self._base.config.vision_config.spatial_merge_size**2
        while left > 0:
            left -= int(grids[end].prod()) // merged
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
        mask, start = self._media.get(_SOUND_MASK), getattr(self._base.config, _STARTS[1], None)
        number = 0 if start is None else int((ids == start).sum())
        if mask is None or not number:
            return None
        first = self._used["audio"]
        self._used["audio"] = first + number
        return mask[first : first + number].sum(-1)

    def _is_place(self, ids: Tensor, kind: str) -> Tensor:
        token = placeholder_id(self._base.config, kind)
        return torch.zeros_like(ids[0]).bool() if token is None else ids[0] == token

    def _token_types(self, ids: Tensor, start: int) -> Tensor:
        if TYPES_NAME in self._media:
            return self._media[TYPES_NAME][:, start : start + ids.shape[1]]
        types = torch.zeros_like(ids)
        for kind, number in _TYPES.items():
            types[0, self._is_place(ids, kind)] = number
        return types

    def _seconds(self, videos: slice | None) -> dict[str, Tensor]:
        """What each frame of these videos stands for, where that is known."""
        given = next((self._media[name] for name in _SECONDS if name in self._media), None)
        name = next((name for name in _SECONDS if name in self._known), None)
        return {} if videos is None or given is None or name is None else {name: given[videos]}
