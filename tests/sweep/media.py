"""Rows with images, videos and sounds for any model of transformers that takes such.

How a family's media look is what `blank_media` knows; these have values, and other sizes where the
family says a size. How many places they take is what the model's own code makes of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.models.families.towers import NESTED_IMAGES
from omnilit.models.media.blank import blank_media
from omnilit.models.media.feed import feature_rows
from omnilit.models.media.rope_positions import MODALITY, SECONDS, TYPES_NAME, placeholder_id
from omnilit.models.model_mask import TYPES_NAMES
from omnilit.models.towers import asked_of_features, base_of, features_name, media_kinds
from omnilit.types import IGNORE, MODALITIES, MicroBatch
from tests.helpers.models import packed_row

TEXT: Final = range(40, 100)  # what is before are placeholders and the like
KEEP: Final = 0.7
SHAPES: Final = ((1, 2), (2, 1), (2, 3))  # of images, as multiples of the smallest one's sides
TYPES: Final = {"image": 1, "video": 2, "audio": 3}


@dataclass(frozen=True)
class MediaSample:
    """One sequence, as a processor gives it.

    Args:
        ids: int64 [T].
        media: What its images, videos and sounds came to.
        types: Which kind each token is of, int64 [T].
    """

    ids: Tensor
    types: Tensor
    media: dict[str, Tensor] = field(default_factory=dict)


class SampleMaker:
    """Makes sequences with media for one model.

    Args:
        model: By transformers alone; asked how many places media take.
        seed: Of all values.
    """

    def __init__(self, model: PreTrainedModel, *, seed: int) -> None:
        self._base = base_of(model)
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self, length: int, media: Sequence[str]) -> MediaSample:
        """Random text with media in the middle of it.

        Args:
            length: Tokens of text.
            media: Kinds, one a medium.
        """
        text = torch.randint(TEXT.start, TEXT.stop, (length,), generator=self._generator)
        for kind in MODALITIES:  # some configurations have their placeholders among words
            token = placeholder_id(self._base.config, kind)
            if token is not None:
                text[text == token] = TEXT.stop
        parts = [(text[: length // 2], 0)]
        found: dict[str, list[Tensor]] = {}
        for at, kind in enumerate(media):
            one = self._medium(kind, SHAPES[at % len(SHAPES)])
            for name, tensor in one.items():
                found.setdefault(name, []).append(tensor)
            parts += self._places(kind, one)
        parts.append((text[length // 2 :], 0))
        return MediaSample(
            torch.cat([ids for ids, _ in parts]),
            torch.cat([torch.full_like(ids, number) for ids, number in parts]),
            {name: join(self._base, tensors) for name, tensors in found.items()},
        )

    def _medium(self, kind: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        """What a processor makes of one medium."""
        blank = blank_media(self._base, kind, device="cpu")
        if "num_local_patches" in asked_of_features(self._base, kind):
            blank |= {
                "pixel_values_local": blank["pixel_values"].clone(),
                "num_local_patches": torch.tensor([1]),
            }
        grid_name, name = f"{kind}_grid_thw", MODALITIES[kind]
        if grid_name in blank:
            merges_frames = hasattr(self._base.config.vision_config, "pos_emb_time")
            times = 2 if kind == "video" and not merges_frames else 1
            by = torch.tensor([[times, *shape]])
            blank[grid_name] = blank[grid_name] * by
            width = blank[name].shape[1:]
            blank[name] = torch.zeros(int(blank[grid_name].prod()), *width)
        if kind == "video":
            taken = inspect.signature(type(self._base).forward).parameters
            blank |= {name: torch.tensor([0.5]) for name in SECONDS if name in taken}
            kept = {name: blank.pop(name) for name in SECONDS if name in blank}
        else:
            kept = {}
        return kept | {
            name: torch.randn(value.shape, generator=self._generator)
            if value.is_floating_point() and "mask" not in name
            else value
            for name, value in blank.items()
        }

    def _places(self, kind: str, medium: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
        """The tokens of one medium, with what their type is called."""
        token = placeholder_id(self._base.config, kind)
        assert token is not None, f"the configuration has no placeholder for {kind}"
        run = torch.full((self._count(kind, medium),), token)
        config, edge = self._base.config, "audio" if kind == "audio" else "vision"
        sides = [getattr(config, f"{edge}_{side}_token_id", None) for side in ("start", "end")]
        start, end = (torch.tensor([50] if one is None else [one]) for one in sides)
        runs = run.split(len(run) // 2) if kind == "video" and self._tells_frames else [run]
        return [part for run in runs for part in ((start, 0), (run, TYPES[kind]), (end, 0))]

    @cached_property
    def _tells_frames(self) -> bool:
        """Whether each frame of a video is written on its own, behind its time."""
        counts = getattr(type(self._base), "get_rope_index", None)
        return counts is not None and "repeat_interleave" in inspect.getsource(counts)

    def _count(self, kind: str, medium: dict[str, Tensor]) -> int:
        ask = getattr(self._base, features_name(kind))
        known = inspect.signature(inspect.unwrap(ask)).parameters
        names = {MODALITIES[kind]: "pixel_values"} if MODALITIES[kind] not in known else {}
        given = {names.get(n, n): v for n, v in medium.items() if names.get(n, n) in known}
        with torch.no_grad():
            output = ask(**given, **_defaults(self._base, known))
        return feature_rows(self._base, kind, output)


def _defaults(base: PreTrainedModel, known: Any) -> dict[str, Any]:
    """Settings that the forward of a model takes from its configuration."""
    names = [n for n in known if n.startswith("vision_") and hasattr(base.config, n)]
    return {name: getattr(base.config, name) for name in names}


def join(base: PreTrainedModel, parts: Sequence[Tensor]) -> Tensor:
    """One tensor of several media's, as a processor that is given all at once."""
    if base.config.model_type in NESTED_IMAGES and parts[0].shape[0] == 1:
        return torch.cat(list(parts), dim=1)
    if parts[0].ndim == 4 and "target_sizes" in asked_of_features(base, "image"):
        return torch.cat(list(parts), dim=-1)  # a strip
    return torch.cat(list(parts))


def media_samples(model: PreTrainedModel) -> list[list[MediaSample]]:
    """Of two rows their samples: the second has none of the first one's media."""
    maker = SampleMaker(model, seed=2)
    plans: list[tuple[int, list[str]]] = [(5, []), (6, ["image"]), (7, ["image", "image"])]
    plans += [(8, [kind]) for kind in sorted(media_kinds(model) - {"image"})]
    first = [maker.sample(length, kinds) for length, kinds in plans]
    return [first, [maker.sample(17, []), maker.sample(6, [])]]


def pack_media(model: PreTrainedModel, samples: Sequence[MediaSample], *, seed: int) -> MicroBatch:
    """The samples in one row, a share of the tokens supervised."""
    names = dict.fromkeys(name for one in samples for name in one.media)
    base = base_of(model)
    media = {
        name: join(base, [s.media[name] for s in samples if name in s.media]) for name in names
    }
    if media:
        media[TYPES_NAME] = torch.cat([one.types for one in samples])[None]
    generator = torch.Generator().manual_seed(seed)
    return packed_row([one.ids for one in samples], keep=KEEP, generator=generator, media=media)


def sample_inputs(model: PreTrainedModel, sample: MediaSample) -> dict[str, Tensor]:
    """What the forward of transformers takes of one sequence."""
    takes = inspect.signature(type(model).forward).parameters
    types = {name: sample.types[None] for name in (*TYPES_NAMES, MODALITY) if name in takes}
    return {
        "input_ids": sample.ids[None],
        "attention_mask": torch.ones_like(sample.ids)[None],
        **{name: _as(value, model.dtype) for name, value in sample.media.items()},
        **types,
    }


def media_loss(model: PreTrainedModel, samples: Sequence[MediaSample], batch: MicroBatch) -> Tensor:
    """The summed loss of the packed samples by transformers alone, one sequence at a time."""
    total = torch.zeros(())
    for one, a, b in zip(samples, batch.bounds, batch.bounds[1:], strict=False):
        logits = model(**sample_inputs(model, one), use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0].float(), batch.labels[0, a:b], ignore_index=IGNORE, reduction="sum"
        )
    return total


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
