"""How many pixels a processor gives images and frames, and where `mm_configs` go before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from omnilit.config.media import MediaConfig, fit_size

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# What a size of bounds holds, and what formulas for images call it
EDGES: Final = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
FORMULAS: Final = {"image": "get_number_of_image_patches", "video": "get_num_of_video_patches"}


@dataclass(frozen=True)
class PixelBounds:
    """Of a processor that brings images or videos to a number of pixels, with a formula for it.

    Args:
        part: The image or video processor.
        kind: `image` or `video`.
        low: What is smaller is enlarged to it; of a frame or of a whole video, as its code has it.
        high: What is larger is reduced to it; likewise.
        gives_way: Whether an upper bound of `mm_configs` is below `low`. Sizes are planned then so
            that the processor has nothing to change.
    """

    part: Any
    kind: str
    low: int
    high: int
    gives_way: bool = False

    @property
    def unit(self) -> int:
        """The side of a place, in pixels."""
        return int(self.part.patch_size * self.part.merge_size)

    def size(self) -> dict[str, int]:
        """The bounds as the processor is told them."""
        low = min(self.low, self.unit**2) if self.gives_way else self.low
        return dict(zip(EDGES, (low, self.high), strict=True))

    def count_patches(self, size: tuple[int, int], frames: int = 1) -> int:
        """Patches of an image, or of a video with so many frames, by the processor's formula."""
        formula, bounds = getattr(self.part, FORMULAS[self.kind]), self.size()
        if self.kind == "video":
            return int(formula(frames, *size, {"size": bounds}))
        return int(formula(*size, {name: bounds[edge] for edge, name in EDGES.items()}))

    def least(self, frames: int = 1) -> int:
        """Pixels of the smallest image, or frame of so many, where the processor decides."""
        own = replace(self, gives_way=False)
        steps = -(-frames // self.part.temporal_patch_size) if self.kind == "video" else 1
        patches = own.count_patches((self.unit, self.unit), frames) // steps
        return patches * int(self.part.patch_size) ** 2


def find_bounds(
    processor: ProcessorMixin, part: Any, kind: str, config: MediaConfig
) -> PixelBounds | None:
    """The bounds of one kind of media; None where the processor has none that are pixels.

    Args:
        processor: Of the model; its presets go before what the part says.
        part: Its image or video processor, None where there is none.
        kind: `image` or `video`.
        config: `mm_configs`.
    """
    preset = getattr(processor, f"{kind}s_kwargs", {})
    size = dict(preset.get("size") or getattr(part, "size", None) or {})
    needed = (FORMULAS[kind], "merge_size", "patch_size")
    if not all(size.get(name) for name in EDGES) or not all(hasattr(part, one) for one in needed):
        return None
    low, high = (int(size[name]) for name in EDGES)
    own = PixelBounds(part, kind, low, high)
    if kind == "image":
        gives_way = config.image_max_pixels is not None and config.image_max_pixels < own.least()
    else:  # of the fewest frames that there can be, since some count the pixels of all frames
        most, frames = config.video_max_pixels, int(part.temporal_patch_size)
        gives_way = config.video_total_pixels is not None or (
            most is not None and most < own.least(frames)
        )
    return replace(own, gives_way=gives_way)


def fit_bounds(
    size: tuple[int, int],
    *,
    factor: int | None,
    least: int | None,
    most: float | None,
    own: PixelBounds | None,
    frames: int = 1,
) -> tuple[int, int]:
    """The size that an image or a frame is brought to before the processor sees it.

    Args:
        size: Its height and width.
        factor: `mm_configs.scale_factor`.
        least: Its pixels at least, as `mm_configs` say.
        most: Likewise at most.
        own: The processor's bounds.
        frames: Of the video.
    """
    if own is not None and own.gives_way and most is not None:
        # The processor's lower bound holds as far as the upper one lets it
        least = int(min(own.least(frames), most)) if least is None else least
        factor = factor if factor and factor % own.unit == 0 else own.unit
    return fit_size(*size, factor=factor, min_pixels=least, max_pixels=most)
