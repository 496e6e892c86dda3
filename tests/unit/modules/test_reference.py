"""What the kept log-probabilities of a reference model are known by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from omnilit.errors import ConfigError, DataError
from omnilit.modules.reference import StoredReference, describe_weights, pair_data_of
from omnilit.types import MicroBatch, Origin


def test_other_weights_are_known_by_their_contents(tmp_path):
    config, file = Qwen3Config(), tmp_path / "model.safetensors"
    found = []
    for value in (0.0, 1.0, 0.0):
        save_file({"w": torch.full((3,), value)}, file)
        found.append(describe_weights(config, str(tmp_path), seed=None))
    assert found[0] == found[2] != found[1]


def test_random_weights_are_known_by_seed_and_configuration():
    moved: Any = Qwen3Config()
    moved._name_or_path = "elsewhere"
    one = describe_weights(Qwen3Config(), None, seed=1)
    assert one == describe_weights(moved, None, seed=1)
    assert one != describe_weights(Qwen3Config(), None, seed=2)
    assert one != describe_weights(Qwen3Config(rms_norm_eps=1e-3), None, seed=1)


def test_a_pair_that_was_not_scored_is_an_error_that_names_it():
    stored = StoredReference(SimpleNamespace(prepared=list, score_loader=None), {})  # pyright: ignore[reportArgumentType]
    nothing = torch.zeros(1, 2, dtype=torch.int64)
    batch = MicroBatch(nothing, nothing, nothing, [0, 1, 2], (Origin("s", "f", 3),) * 2, {})
    with pytest.raises(DataError, match="this pair was not there when the reference model"):
        stored.of_batch(batch)


def test_other_data_modules_are_refused():
    with pytest.raises(ConfigError, match="NoneType does not say which pairs there are"):
        pair_data_of(None)
