"""Positions of packed rows, beside those that a model counts for one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnilit.models.media.rope_positions import TYPES, TYPES_NAME, is_place, rope_positions
from omnilit.models.towers import base_of
from tests.sweep.media import media_samples, pack_media
from tests.sweep.tiny import tiny_config, tiny_model


@pytest.mark.parametrize(
    "family",
    [
        "hunyuan_vl",  # ends of lines have places, which its grids do not say
        "minicpmv4_7",  # sizes have no frames
        "glm4v",  # videos have the token of images
    ],
)
def test_a_packed_row_counts_like_its_sequences_alone(family):
    config: Any = tiny_config(family)
    num_axes = 3
    if family == "hunyuan_vl":  # of which published models have one more, in front
        num_axes, config.text_config.rope_parameters["mrope_section"] = 4, [1, 1, 1, 1]
    model = tiny_model(config, takes_media=True)
    base: Any = base_of(model)
    samples = [one for row in media_samples(model) for one in row]
    row = pack_media(model, samples, seed=0)
    expected = []
    for one in samples:
        alone = torch.arange(len(one.ids)).expand(num_axes, 1, -1)
        if one.media:
            alone, _ = base.get_rope_index(one.ids[None], one.types[None], **sizes(one.media))
        expected.append(alone)
    assert torch.equal(rope_positions(base, row), torch.cat(expected, dim=-1))
    kinds = [kind for kind in TYPES if kind in row.modalities]
    for kind in kinds:
        mask = is_place(base.config, row.media, row.input_ids[0], kind)
        assert torch.equal(mask, row.media[TYPES_NAME][0] == TYPES[kind])
    assert kinds == (["image"] if family == "hunyuan_vl" else ["image", "video"])


def sizes(media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v for n, v in media.items() if n.endswith("grid_thw") or n.startswith("target_")}
