"""What a model's own code says of tokens that see those behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilit.models.model_mask import keep_mask, sees_ahead
from tests.helpers.media_models import tiny_media


class Layered:
    """A model whose forward leaves masks to a method of its own."""

    @property
    def base_model(self) -> Layered:
        return self

    def forward(self, ids: Tensor) -> Tensor:
        return self.make_mask(ids)

    def make_mask(self, ids: Tensor) -> Tensor:
        named = {"block_sequence_ids": ids}
        return named["block_sequence_ids"]


def test_it_is_found_in_methods_that_the_forward_calls():
    model: Any = Layered()
    assert sees_ahead(model)
    assert not sees_ahead(tiny_media("llava"))


def test_a_kept_mask_is_asked_at_places_behind_those_of_a_window():
    mask = keep_mask(mask_function=lambda _row, _head, query, key: key <= query - 5, kv_offset=7)
    places = torch.arange(8)
    assert mask.sees(places[:, None], places[None]).tolist() == [
        [key + 7 <= query + 7 - 5 for key in range(8)] for query in range(8)
    ]
