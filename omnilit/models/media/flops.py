"""What the images, videos and sounds of a row cost the towers that look at them or listen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from omnilit.models.families.towers import PICTURE_TOWERS
from omnilit.models.media.rope_positions import SOUND_MASK, is_place
from omnilit.models.media.tower_flops import TowerFlops, TowerLoad, count_tower_flops
from omnilit.models.towers import Towers, base_of, grid_kinds, media_kinds
from omnilit.types import MODALITIES, Grid, MicroBatch, grid_name

_CLASS_TOKENS: Final = ("class_embedding", "cls_token")


class _Layout(Protocol):
    """How media of one kind come to a tower.

    Args:
        name: Of what tells their sizes, among the media of a row.
    """

    @property
    def name(self) -> str: ...

    def loads(self, flops: TowerFlops, sizes: Tensor) -> Iterable[TowerLoad]:
        """What each of them comes to, but for the places of its features."""
        ...


@dataclass(frozen=True, slots=True)
class _Grids:
    """Patches in a list, each of which sees its own frame or a window of it.

    Args:
        name: Of what tells their sizes.
        patch: The shape of one: frames, height and width.
        window: Patches along the side of a window; 0 for none.
    """

    name: str
    patch: tuple[int, int, int]
    window: int

    def loads(self, flops: TowerFlops, sizes: Tensor) -> Iterable[TowerLoad]:
        embedding, _ = flops.embed(self.patch)
        for grid in sizes.tolist():
            num_patches, pairs = prod(grid), grid[0] * prod(grid[1:]) ** 2
            yield TowerLoad(embedding * num_patches, num_patches, pairs, self._near_pairs(grid), 0)

    def _near_pairs(self, grid: Grid) -> int:
        frames, rows, columns = grid
        return frames * _pairs(rows, self.window) * _pairs(columns, self.window)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Whole pictures, all of one size, each of whose patches sees the others.

    Args:
        name: Of what tells their sizes.
        num_more: Tokens beside the patches of each, such as a class token.
    """

    name: str
    num_more: int

    def loads(self, flops: TowerFlops, sizes: Tensor) -> Iterable[TowerLoad]:
        *several, _, height, width = sizes.shape
        embedding, shape = flops.embed((height, width))
        num_tokens = prod(shape) + self.num_more
        return [TowerLoad(embedding, num_tokens, num_tokens**2, 0, 0)] * prod(several)


@dataclass(frozen=True, slots=True)
class _Sounds:
    """Sounds that are cut into chunks, which convolutions see one at a time.

    Args:
        name: Of what tells their sizes.
        num_bins: Numbers of a frame.
        chunk: Frames.
        per_window: Whole chunks whose tokens see each other.
    """

    name: str
    num_bins: int
    chunk: int
    per_window: int

    def loads(self, flops: TowerFlops, sizes: Tensor) -> Iterable[TowerLoad]:
        of_chunk, (*_, per_chunk) = flops.embed((self.num_bins, self.chunk))
        for frames in sizes.sum(-1).tolist():
            number, rest = divmod(frames, self.chunk)
            embedding, num_tokens = of_chunk * number, per_chunk * number
            if rest:
                of_rest, (*_, num_more) = flops.embed((self.num_bins, rest))
                embedding, num_tokens = embedding + of_rest, num_tokens + num_more
            pairs = _pairs(num_tokens, per_chunk * self.per_window)
            yield TowerLoad(embedding, num_tokens, pairs, 0, 0)


@dataclass(frozen=True, slots=True)
class MediaFlops:
    """The cost of a model's towers.

    Args:
        config: Of the base model.
        known: By kind of media, what its tower costs and how they come to it; kinds that are not
            in it cost something that nothing here counts.
    """

    config: PreTrainedConfig
    known: Mapping[str, tuple[TowerFlops, _Layout]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> MediaFlops:
        """Count them, once it is decided what is trained and before anything is sharded.

        Args:
            model: Whole; the meta device will do.
        """
        base, known = base_of(model), {}
        for kind in sorted(media_kinds(model)):
            layout = _layout(model, kind)
            flops = None if layout is None else _count(model, kind)
            if layout is not None and flops is not None:
                known[kind] = flops, layout
        return cls(base.config, known)

    def of_row(self, batch: MicroBatch) -> float | None:
        """Operations of training on the media of a row; None where they are not known.

        Args:
            batch: Whole and on the CPU.
        """
        if not batch.modalities <= self.known.keys():
            return None
        return sum((self._of_kind(batch, kind) for kind in sorted(batch.modalities)), 0.0)

    def _of_kind(self, batch: MicroBatch, kind: str) -> float:
        flops, layout = self.known[kind]
        places = is_place(self.config, batch.media, batch.input_ids[0], kind)
        loads = [
            *layout.loads(flops, batch.media[layout.name]),
            TowerLoad(0, 0, 0, 0, int(places.sum())),
        ]
        return flops.of(TowerLoad(*map(sum, zip(*loads, strict=True))))


def _layout(model: PreTrainedModel, kind: str) -> _Layout | None:
    tower: Any = base_of(model).get_encoder(kind)
    config = tower.config
    if kind in grid_kinds(model):
        window = getattr(config, "window_size", 0) // config.patch_size
        merge = config.spatial_merge_size
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        return _Grids(grid_name(kind), patch, window // merge * merge)
    if kind == "audio" and hasattr(config, "n_window"):
        chunk = 2 * config.n_window
        per_window = getattr(config, "n_window_infer", chunk) // chunk
        return _Sounds(SOUND_MASK, config.num_mel_bins, chunk, per_window)
    if kind == "image" and config.model_type in PICTURE_TOWERS.get(model.config.model_type, ()):
        names = (name.rpartition(".")[2] for name, _ in tower.named_parameters())
        return _Pictures(MODALITIES[kind], sum(name in _CLASS_TOKENS for name in names))
    return None


def _count(model: PreTrainedModel, kind: str) -> TowerFlops | None:
    base = base_of(model)
    beside = [model.get_submodule(name.removesuffix(".")) for name in Towers.of(model).projectors]
    tower: PreTrainedModel = base.get_encoder(kind)
    used = getattr(base.config, "vision_feature_layer", None)
    if used is None:
        return count_tower_flops(tower, beside=beside)
    levels = tower.config.num_hidden_layers + 1  # outcomes, of which the first is the embedding
    chosen = [used] if isinstance(used, int) else used
    return count_tower_flops(tower, beside=beside, num_used=max(one % levels for one in chosen))


def _pairs(length: int, window: int) -> int:
    """Pairs within windows side by side."""
    if not window:
        return length**2
    number, rest = divmod(length, window)
    return number * window**2 + rest**2
