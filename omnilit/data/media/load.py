"""What a model takes of the media of a micro-batch, read when it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnilit.data.media.plans import changed, decode_media
from omnilit.data.media.processor import MediaProcessor
from omnilit.errors import DataError
from omnilit.types import Sample


def load_media(samples: Sequence[Sample], processor: MediaProcessor) -> dict[str, Tensor]:
    """The media of some samples, in order, under the names of the model's `forward`.

    Args:
        samples: As they were prepared.
        processor: Of the model.

    Raises:
        DataError: A medium cannot be decoded, or has other places than it had; names its record.
    """
    media = [(medium, sample.origin) for sample in samples for medium in sample.media]
    if not media:
        return {}
    decoded = decode_media(media, processor)
    try:
        tensors, texts = processor.process(decoded)
    except ValueError as error:  # which of them it was is not told
        origin = media[0][1]
        raise DataError(
            problem=f"the model's processor refuses the {', '.join(decoded.kinds)} of the record "
            f"({error})",
            fix="change the record, or remove it",
            file=origin.file,
            row=origin.row,
        ) from error
    for (medium, origin), text in zip(media, texts, strict=True):
        if processor.count_places(text) != medium.num_tokens:
            raise changed(origin, medium)
    return tensors


def token_types(
    input_ids: npt.NDArray[np.int64], processor: MediaProcessor, *, has_media: bool
) -> dict[str, Tensor]:
    """Which tokens are of which kind, [1, T]; for models that are told, where there is something.

    Models that call it `token_type_ids` want it for text alone, too.
    """
    name = processor.types_name
    if name is None or not (has_media or name == "token_type_ids"):
        return {}
    return {name: torch.from_numpy(processor.token_types(input_ids))[None]}
