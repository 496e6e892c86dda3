"""Packed rows with images, videos and sounds, beside transformers on one sample at a time."""

from __future__ import annotations

import pytest
import torch

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.models.bind import bind_kernels
from tests.helpers.media_models import (
    MediaSample,
    media_config,
    pack,
    reference_loss,
    sample,
    tiny_media,
)
from tests.helpers.models import gradients, worst_difference

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
PLAIN = ("llava", "internvl", "smolvlm")
RTOL = 1e-4  # the measured differences are below 2e-5


def kernels() -> KernelSet:
    return resolve_kernels(OpsImplementationConfig(), given=frozenset(), machine=Machine("cpu"))


def samples_of(family: str) -> list[MediaSample]:
    """Text alone, one image, two images; videos and sounds where the family takes them."""
    several = [(1, 4, 6), (1, 8, 4)]
    found = [
        sample(family, 9, seed=1),
        sample(family, 12, seed=2, images=[(1, 4, 4)]),
        sample(family, 7, seed=3, images=several),
    ]
    if family not in PLAIN:
        found.append(sample(family, 11, seed=4, videos=[(2, 4, 4)]))
    if family in THINKERS:
        # longer than a chunk of Qwen3's tower, which pads shorter ones to the longest beside them
        found.append(sample(family, 8, seed=5, sounds=[113, 120]))
        found.append(sample(family, 8, seed=6, images=[(1, 4, 4)], sounds=[117]))
    return found


@pytest.mark.parametrize("family", [*GRIDS, *THINKERS, *PLAIN])
def test_packed_training_equals_one_sample_at_a_time(family):
    samples = samples_of(family)
    batch = pack(samples)
    plain, packed = tiny_media(family), tiny_media(family)
    expected = reference_loss(plain, samples, batch)
    expected.backward()
    binding = bind_kernels(packed, kernels(), takes_media=True)
    losses = binding.forward(packed, batch).token_losses
    loss = losses.sum() / batch.counts["tokens"]
    loss.backward()
    binding.verify_called()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert worst_difference(_seen(packed), _seen(plain)) <= RTOL


def _seen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients but those that are rounding alone: softmax does not see what all keys share."""
    return {n: g for n, g in gradients(model).items() if not n.endswith("k_proj.bias")}


def test_tokens_of_an_image_that_see_each_other_are_refused_by_name():
    with pytest.raises(ConfigError, match="Gemma3ForConditionalGeneration cannot be trained on"):
        bind_kernels(tiny_media("gemma3"), kernels(), takes_media=True)


def test_configurations_name_a_class_with_towers():
    assert media_config("qwen3_5").architectures == ["Qwen3_5ForConditionalGeneration"]
