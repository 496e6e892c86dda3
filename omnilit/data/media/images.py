"""Images: their size from the head of the file, and their pixels when they are trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from PIL import Image, ImageOps, UnidentifiedImageError

from omnilit.config.media import MediaConfig
from omnilit.data.media.bounds import PixelBounds, fit_bounds
from omnilit.data.media.files import media_error, open_medium
from omnilit.types import Medium, Origin

MAX_SIDE: Final = 32_767  # what codecs and resizing count in 16 bits
ORIENTATION: Final = 0x0112
TURNED: Final = (5, 6, 7, 8)  # height and width are exchanged
BROKEN: Final = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
)


def read_size(medium: Medium, origin: Origin) -> tuple[int, int]:
    """Height and width as the image is seen, without decoding it.

    Raises:
        DataError: It is no image, or none that can be used.
    """
    with _opened(medium, origin) as image:
        height, width = image.height, image.width
        return (width, height) if _orientation(image) in TURNED else (height, width)


def read_image(medium: Medium, origin: Origin, size: tuple[int, int]) -> Image.Image:
    """An image, upright, in RGB, and of another size.

    Args:
        medium: The image.
        origin: Of its record.
        size: Height and width that it is brought to.

    Raises:
        DataError: It cannot be decoded.
    """
    with _opened(medium, origin) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
        plain = _to_rgb(turned)
        height, width = size
        return plain if plain.size == (width, height) else plain.resize((width, height))


def planned_size(
    medium: Medium,
    origin: Origin,
    size: tuple[int, int],
    config: MediaConfig,
    own: PixelBounds | None = None,
) -> tuple[int, int]:
    """The size that `mm_configs` give an image.

    Args:
        medium: The image.
        origin: Of its record.
        size: Its height and width.
        config: What they say.
        own: The processor's bounds.

    Raises:
        DataError: Its sides are too different.
    """
    height, width = size
    if config.max_ratio is not None and max(size) > config.max_ratio * min(size):
        raise media_error(
            origin,
            medium,
            f"it is {width} x {height}, and mm_configs.max_ratio is {config.max_ratio:g}",
            "raise it, cut the image, or remove the record",
        )
    return fit_bounds(
        size,
        factor=config.scale_factor,
        least=config.image_min_pixels,
        most=config.image_max_pixels,
        own=own,
    )


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # what stands behind the pixels would have them decoded
    found: Any = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        ground = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, clear).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(medium: Medium, origin: Origin) -> Iterator[Image.Image]:
    """The image of a medium, its head read and looked at; what goes wrong within is told."""
    with open_medium(medium, origin) as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                _check(image, medium, origin)
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise media_error(
                origin,
                medium,
                f"it is larger than Pillow decodes ({error})",
                "reduce it, or remove the record",
            ) from error
        except UnidentifiedImageError as error:
            raise media_error(
                origin, medium, "it is no image that Pillow knows", "mend or remove it"
            ) from error
        except BROKEN as error:
            raise media_error(
                origin, medium, f"it is damaged ({error})", "mend or remove it"
            ) from error


def _check(image: Image.Image, medium: Medium, origin: Origin) -> None:
    if min(image.size) < 1:
        raise media_error(origin, medium, "it has no pixels", "mend or remove it")
    if max(image.size) > MAX_SIDE:
        shown = f"{image.width} x {image.height}"
        problem = f"it is {shown}, more than {MAX_SIDE} pixels at one side"
        raise media_error(origin, medium, problem, "reduce it, or remove the record")
