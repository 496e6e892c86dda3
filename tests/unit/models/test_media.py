"""Packed rows with images, videos and sounds, beside transformers on one sample at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.models.bind import bind_kernels
from omnilit.models.media import MediaFeed
from omnilit.models.media_fit import refuse_unbalanced
from omnilit.models.media_flops import MediaFlops
from omnilit.models.media_ranks import MediaRanks
from omnilit.types import StepStamp
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
        films = {"videos": [(2, 4, 4), (3, 4, 6)], "tracks": [118, 140]}
        found.append(sample(family, 9, seed=7, images=[(1, 4, 4)], **films, sounds=[115]))
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_images_and_videos_cost_what_torch_counts(family):
    model, grids = tiny_media(family), [(1, 4, 6), (2, 4, 4)]
    base: Any = model.base_model
    batch = pack([sample(family, 9, seed=1, images=grids[:1], videos=grids[1:])])
    cost = MediaFlops.of(model, is_frozen=False).of_batch(batch)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        assert batch.media[name].shape[0] == int(batch.media[f"{kind}_grid_thw"].prod())
    pixels = torch.cat([batch.media["pixel_values"], batch.media["pixel_values_videos"]])
    with FlopCounterMode(display=False) as counter:
        output = base.get_image_features(pixels, torch.tensor(grids))
        features = torch.cat(list(output.pooler_output)).sum()
        for level in getattr(output, "deepstack_features", ()):
            features = features + torch.cat(list(level)).sum()
        features.backward()
    assert cost == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base.get_image_features(pixels, torch.tensor(grids))
    assert MediaFlops.of(model, is_frozen=True).of_batch(batch) == counter.get_total_flops()


def test_no_number_is_better_than_a_wrong_one():
    for family in ("qwen2_5_vl", "llava"):  # sees windows; has no grids
        flops = MediaFlops.of(tiny_media(family), is_frozen=False)
        assert flops.of_batch(pack([sample(family, 9, seed=1, images=[(1, 4, 4)])])) is None
        assert flops.of_batch(pack([sample(family, 9, seed=1)])) == 0


def test_tokens_of_an_image_that_see_each_other_are_refused_by_name():
    with pytest.raises(ConfigError, match="Gemma3ForConditionalGeneration cannot be trained on"):
        bind_kernels(tiny_media("gemma3"), kernels(), takes_media=True)


def test_work_is_shared_where_grids_say_what_it_is():
    refuse_unbalanced(tiny_media("qwen2_5_omni_thinker"))
    with pytest.raises(ConfigError, match=r"encoder_data_balance: LlavaFor.* has no images or vi"):
        refuse_unbalanced(tiny_media("llava"))


def test_a_loader_that_does_not_say_what_other_ranks_have_is_refused():
    feed = MediaFeed(tiny_media("qwen3_vl"))
    others: Any = object()  # is asked for nothing
    feed.ranks = MediaRanks(data=others)
    row = pack([sample("qwen3_vl", 9, seed=1, images=[(1, 4, 4)])])
    with pytest.raises(ConfigError, match="the training loader does not say what other ranks"):
        feed.prepare(replace(row, stamp=StepStamp({}, 0, 0, 1)))
    assert not feed.prepare(row).routes  # of an evaluation: it looks at its own


def test_a_tower_without_levels_for_deeper_layers_trains():
    config: Any = media_config("qwen3_vl")
    config.vision_config.deepstack_visual_indexes = []
    model = AutoModelForImageTextToText.from_config(config)
    binding = bind_kernels(model, kernels(), takes_media=True)
    batch = pack([sample("qwen3_vl", 9, seed=1, images=[(1, 4, 4)])])
    assert binding.forward(model, batch).token_losses.isfinite().all()


def test_configurations_name_a_class_with_towers():
    assert media_config("qwen3_5").architectures == ["Qwen3_5ForConditionalGeneration"]
