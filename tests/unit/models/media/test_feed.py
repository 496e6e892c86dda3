"""Packed rows with images, videos and sounds, beside transformers on one sample at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, SiglipVisionConfig

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError, KernelError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import KernelSet, resolve_kernels
from omnilit.models.attention_fit import fit_attention
from omnilit.models.bind import bind_kernels
from omnilit.models.build import build_meta
from omnilit.models.media.feed import MediaFeed
from omnilit.models.media.fit import refuse_split, refuse_spread, refuse_unbalanced
from omnilit.models.media.flops import MediaFlops
from omnilit.models.media.ranks import MediaRanks
from omnilit.models.towers import Towers, asked_of_features
from omnilit.types import MicroBatch, StepStamp
from tests.helpers.media_models import (
    MediaSample,
    media_config,
    pack,
    reference_loss,
    sample,
    tiny_media,
)
from tests.helpers.models import gradients, worst_difference
from tests.sweep import tiny as sweep

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
PLAIN = ("llava", "internvl", "smolvlm", "gemma3")
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


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [3, 30])
def test_tokens_of_an_image_see_each_other_within_their_sequence(backend, window):
    samples = samples_of("gemma3")
    ops = OpsImplementationConfig(attn_implementation=backend)
    chosen = resolve_kernels(ops, given=frozenset({"attn_implementation"}), machine=Machine("cpu"))
    plain, packed = (tiny_media("gemma3", sliding_window=window) for _ in range(2))
    batch = pack(samples)
    expected = reference_loss(plain, samples, batch)
    expected.backward()
    binding = bind_kernels(packed, chosen, takes_media=True)
    loss = binding.forward(packed, batch).token_losses.sum() / batch.counts["tokens"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert worst_difference(_seen(packed), _seen(plain)) <= RTOL


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


COSTLY = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", *THINKERS, *PLAIN[:3], "llava_siglip"]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 4,
}


def costly_model(family: str) -> Any:
    if family == "llava_siglip":  # without a class token
        config: Any = media_config("llava")
        config.vision_config = SiglipVisionConfig(**SMALL, vision_use_head=False)
        config.vision_feature_select_strategy = "full"
        return AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model: Any = tiny_media(family)
    if family == "qwen3_omni_moe_thinker":
        tower = model.base_model.audio_tower
        tower.n_window_infer = tower.config.n_window_infer = 200  # two chunks see each other
    return model


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("family", COSTLY)
def test_media_cost_what_torch_counts(family, is_frozen):
    """Windows are cut off at edges here, and chunks of sounds at their ends."""
    model = costly_model(family)
    media: dict[str, Any] = {"images": [(1, 4, 6), (1, 10, 6)]}
    if family.startswith("qwen"):
        media["videos"] = [(2, 4, 4)]
    if family in THINKERS:
        media["sounds"] = SOUNDS[family]
    batch = pack([sample(family.removesuffix("_siglip"), 9, seed=1, **media)])
    towers = Towers.of(model)
    towers.freeze(model, vision=is_frozen, audio=is_frozen and family in THINKERS)
    cost = MediaFlops.of(model).of_row(batch)
    with FlopCounterMode(display=False) as counter:
        sums = [
            total for kind in sorted(batch.modalities) for total in features(model, kind, batch)
        ]
        if any(total.requires_grad for total in sums):
            torch.stack(sums).sum().backward()
    assert cost == counter.get_total_flops()


# whole chunks, or all as long as each other: the tower pads the rest, which does not count
SOUNDS = {"qwen2_5_omni_thinker": [16, 24], "qwen3_omni_moe_thinker": [300, 100]}


def features(model: Any, kind: str, batch: MicroBatch) -> list[torch.Tensor]:
    """The sum of each level of what the model makes of one kind of media."""
    base = model.base_model
    asked = set(asked_of_features(base, kind))
    given = {name: value for name, value in batch.media.items() if name in asked}
    output = getattr(base, f"get_{kind}_features")(**given)
    field = "last_hidden_state" if kind == "audio" else "pooler_output"
    levels = [getattr(output, field), *(getattr(output, "deepstack_features", None) or ())]
    return [torch.cat([*level]).sum() for level in levels]


def test_the_end_of_a_sound_costs_less_than_a_chunk():
    family = "qwen2_5_omni_thinker"
    flops = MediaFlops.of(tiny_media(family))
    rows = [pack([sample(family, 9, seed=1, sounds=[frames])]) for frames in (8, 4, 12)]
    whole, rest, both = map(flops.of_row, rows)
    assert whole is not None
    assert rest is not None
    assert 0 < rest < whole
    assert both == whole + rest  # a window of attention is a chunk


def test_no_number_is_better_than_a_wrong_one():
    flops = MediaFlops.of(tiny_media("gemma3"))  # pools its patches
    assert flops.of_row(pack([sample("gemma3", 9, seed=1, images=[(1, 4, 4)])])) is None
    assert flops.of_row(pack([sample("gemma3", 9, seed=1)])) == 0
    config: Any = media_config("llava")
    config.vision_config = SiglipVisionConfig(**SMALL)
    flops = MediaFlops.of(build_meta(config, dtype=torch.float32))  # pools them, for nothing
    assert flops.of_row(pack([sample("llava", 9, seed=1, images=[(1, 4, 4)])])) is None


def test_a_prompt_that_sees_all_of_itself_is_refused_by_name():
    model = AutoModelForImageTextToText.from_config(sweep.tiny_config("paligemma"))
    with pytest.raises(ConfigError, match=r"PaliGemmaForC.* cannot be .*all tokens of a prompt"):
        bind_kernels(model, kernels(), takes_media=True)


def test_rows_of_a_model_with_masks_of_its_own_stay_whole():
    with pytest.raises(ConfigError, match=r"Gemma3ForC.* leave ulysses_size and cp_size out"):
        refuse_split(tiny_media("gemma3"))
    refuse_split(tiny_media("qwen3_vl"))


def test_kernels_that_have_no_masks_are_refused_for_images_alone():
    machine = Machine("cuda", sm=90, packages={"flash-attn": "2.8"})
    ops = OpsImplementationConfig(attn_implementation="flash_attention_2")
    given = resolve_kernels(ops, given=frozenset({"attn_implementation"}), machine=machine)
    with pytest.raises(KernelError, match="cannot let tokens of an image see those behind them"):
        fit_attention(tiny_media("gemma3"), given, has_masks=True)
    other = fit_attention(tiny_media("gemma3"), given)  # for text
    assert other.choices["attn_implementation"].backend == "flash_attention_2"


def test_work_is_shared_where_grids_say_what_it_is():
    refuse_unbalanced(tiny_media("qwen2_5_omni_thinker"))
    with pytest.raises(ConfigError, match=r"encoder_data_balance: LlavaFor.* has no images or vi"):
        refuse_unbalanced(tiny_media("llava"))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("ernie4_5_vl_moe", "experts of its own for images run where a row has some"),
        ("step3p7", "its tower runs once more where images have local views"),
        ("deepseek_ocr2", "its tower runs once more where images have local views"),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_refused(family, reason):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(sweep.tiny_config(family))
    with pytest.raises(ConfigError, match=f"cannot be trained on several ranks with .*{reason}"):
        refuse_spread(model)
    refuse_spread(tiny_media("qwen3_vl"))


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
