"""Tiny random models that see and hear, and packed rows with media for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from omnilit.models.architecture import choose_towers
from omnilit.types import IGNORE, MicroBatch
from tests.helpers.models import BASE, VOCAB, packed_row

IMAGE, VIDEO, SOUND, START, END, SOUND_START, SOUND_END = range(VOCAB - 8, VOCAB - 1)
PATCH, MERGE, BINS = 4, 2, 16
TEXT = range(3, VOCAB - 8)

_TEXT: dict[str, Any] = {k: v for k, v in BASE.items() if k != "head_dim"}
_MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_GRID: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
_VISION_2 = {**_GRID, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
_VISION_25 = {
    **_GRID,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1],
}
_VISION_35 = {
    **_GRID,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_position_embeddings": 64,
}
_VISION_3 = {**_VISION_35, "deepstack_visual_indexes": [0]}
_AUDIO: dict[str, Any] = {
    "num_mel_bins": BINS,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "n_window": 4,
    "output_dim": 64,
    "max_source_positions": 64,
    "initializer_range": 0.2,
}
_ROPE_2 = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_ROPE_3 = {**_ROPE_2, "mrope_interleaved": True}
_ROPE_35 = {**_ROPE_3, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_BOUNDS: dict[str, Any] = {"vision_start_token_id": START, "vision_end_token_id": END}
_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    **_BOUNDS,
    "tie_word_embeddings": False,
}
_SOUNDS: dict[str, Any] = {
    "audio_token_id": SOUND,
    "audio_start_token_id": SOUND_START,
    "audio_end_token_id": SOUND_END,
}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": PATCH,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}


Grid = tuple[int, int, int]  # frames, rows and columns of patches


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


_CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE_2}, vision_config=_VISION_2, **_TOKENS
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE_2}, vision_config=_VISION_25, **_TOKENS
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config={**BASE, "rope_parameters": _ROPE_3}, vision_config=_VISION_3, **_TOKENS
    ),
    "qwen3_vl_moe": lambda: hf.Qwen3VLMoeConfig(
        text_config={**BASE, **_MOE, "rope_parameters": _ROPE_3},
        vision_config=_VISION_3,
        **_TOKENS,
    ),
    "qwen3_5": lambda: hf.Qwen3_5Config(
        text_config={**BASE, **_DELTA, "rope_parameters": _ROPE_35},
        vision_config=_VISION_35,
        **_TOKENS,
    ),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeConfig(
        text_config={
            **_without(BASE, "intermediate_size"),
            **_MOE,
            **_DELTA,
            "shared_expert_intermediate_size": 32,
            "rope_parameters": _ROPE_35,
        },
        vision_config=_VISION_35,
        **_TOKENS,
    ),
    "qwen2_5_omni_thinker": lambda: hf.Qwen2_5OmniThinkerConfig(
        text_config={**_TEXT, "rope_parameters": _ROPE_2},
        vision_config=_VISION_25,
        audio_config=_AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=SOUND,
        **_BOUNDS,
        audio_start_token_id=SOUND_START,
        audio_end_token_id=SOUND_END,
        tie_word_embeddings=False,
    ),
    "qwen3_omni_moe_thinker": lambda: hf.Qwen3OmniMoeThinkerConfig(
        text_config={**BASE, **_MOE, "rope_parameters": _ROPE_3},
        vision_config=_VISION_3,
        audio_config={
            **_AUDIO,
            "downsample_hidden_size": 16,
            "n_window": 50,
            "n_window_infer": 100,
            "conv_chunksize": 16,
        },
        **{**_TOKENS, **_SOUNDS},
    ),
    "llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**BASE),
        vision_config=hf.CLIPVisionConfig(**_VIT),
        image_token_index=IMAGE,
        image_seq_length=16,
    ),
    "internvl": lambda: hf.InternVLConfig(
        text_config=hf.Qwen2Config(**_TEXT),
        vision_config={**_VIT, "image_size": [16, 16], "patch_size": [PATCH, PATCH]},
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**BASE),
        vision_config=_VIT,
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        text_config={**BASE, "sliding_window": 8},
        vision_config=_VIT,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
}
PLACES = {"llava": 16, "internvl": 4, "smolvlm": 4, "gemma3": 4}  # that an image takes


def media_config(name: str, *, vocab: int = VOCAB) -> hf.PreTrainedConfig:
    """The configuration of family `name`, which names its class with towers."""
    config = _CONFIGS[name]()
    config.get_text_config().vocab_size = vocab
    choose_towers(config)
    return config


def tiny_media(
    name: str, *, seed: int = 0, sliding_window: int | None = None
) -> hf.PreTrainedModel:
    """A float32 model in training mode, the same for the same seed, computing eagerly."""
    torch.manual_seed(seed)
    config: Any = copy.deepcopy(media_config(name))
    if sliding_window is not None:
        config.get_text_config().sliding_window = sliding_window
    model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


@dataclass(frozen=True)
class MediaSample:
    """One sequence, as a processor gives it.

    Args:
        ids: int64 [T].
        media: What its images, videos and sounds came to.
        has_tracks: The sounds of its videos stand among their places.
    """

    ids: Tensor
    media: dict[str, Tensor] = field(default_factory=dict)
    has_tracks: bool = False

    @property
    def token_types(self) -> Tensor:
        """0 for text, 1 for an image's places, 2 for a video's, int64 [1, T]."""
        return ((self.ids == IMAGE).long() + 2 * (self.ids == VIDEO).long())[None]


def sample(
    family: str,
    length: int,
    *,
    seed: int,
    images: Sequence[Grid] = (),
    videos: Sequence[Grid] = (),
    sounds: Sequence[int] = (),
    tracks: Sequence[int] = (),
) -> MediaSample:
    """A sequence of `length` random tokens, with media in front of the last ones.

    Args:
        family: Of the model.
        length: Tokens of text.
        seed: Of all values.
        images: Of each its grid; just as many as there are where the family's are all alike.
        videos: Of each its grid.
        sounds: Of each its number of frames.
        tracks: Of each video the number of frames of its sound; none for silent ones.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT.start, TEXT.stop, (length,), generator=generator).tolist()
    normal = partial(torch.randn, generator=generator)
    middle: list[int] = []
    media: dict[str, Tensor] = {}
    if images and family in PLACES:
        middle += [token for _ in images for token in (*[IMAGE] * PLACES[family], text[0])]
        pixels = normal(len(images), 3, 16, 16)
        media["pixel_values"] = pixels[None] if family == "smolvlm" else pixels
    elif images:
        middle += [token for grid in images for token in _run(IMAGE, grid)]
        media["image_grid_thw"] = torch.tensor(list(images))
        media["pixel_values"] = normal(_num_patches(images), 3 * 2 * PATCH**2)
    if videos:
        is_timed = not family.startswith(("qwen2", "qwen3_omni"))
        if tracks:
            films = zip(videos, tracks, strict=True)
            middle += [token for film in films for token in _film(family, *film)]
        else:
            middle += [token for grid in videos for token in _video(grid, text, is_timed=is_timed)]
        media["video_grid_thw"] = torch.tensor(list(videos))
        media["pixel_values_videos"] = normal(_num_patches(videos), 3 * 2 * PATCH**2)
        if "omni" in family:
            media["video_second_per_grid"] = torch.full((len(videos),), 0.5)
    for frames in sounds:
        middle += [SOUND_START, *[SOUND] * _sound_places(family, frames), SOUND_END]
    if heard := [*tracks, *sounds]:
        media["input_features"] = normal(len(heard), BINS, max(heard))
        mask = torch.arange(max(heard)) < torch.tensor(heard)[:, None]
        media["feature_attention_mask"] = mask.long()
    ids = [*text[: length // 2], *middle, *text[length // 2 :]]
    return MediaSample(torch.tensor(ids), media, has_tracks=bool(tracks))


def _run(token: int, grid: Grid) -> list[int]:
    frames, rows, columns = grid
    return [START, *[token] * (frames * rows * columns // MERGE**2), END]


def _video(grid: Grid, text: Sequence[int], *, is_timed: bool) -> list[int]:
    """The places of a video, each frame behind its time where the family tells it."""
    frames, rows, columns = grid
    if not is_timed:
        return _run(VIDEO, grid)
    return [t for frame in range(frames) for t in (text[frame], *_run(VIDEO, (1, rows, columns)))]


def _film(family: str, grid: Grid, frames: int) -> list[int]:
    """The places of a video and of its sound: each step of it, and what is heard meanwhile."""
    steps, rows, columns = grid
    seen, heard = rows * columns // MERGE**2, _sound_places(family, frames)
    parts = [heard * step // steps for step in range(steps + 1)]
    within = [[VIDEO] * seen + [SOUND] * (b - a) for a, b in pairwise(parts)]
    return [START, SOUND_START, *chain.from_iterable(within), SOUND_END, END]


def _num_patches(grids: Sequence[Grid]) -> int:
    return sum(frames * rows * columns for frames, rows, columns in grids)


def _sound_places(family: str, frames: int) -> int:
    if family == "qwen3_omni_moe_thinker":
        from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
            _get_feat_extract_output_lengths as count,
        )

        return int(count(torch.tensor(frames)))
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def pack(samples: Sequence[MediaSample], *, seed: int = 0, keep: float = 0.7) -> MicroBatch:
    """The samples in one row, a share `keep` of the tokens supervised."""
    names = dict.fromkeys(name for one in samples for name in one.media)
    media = {name: _join([s.media[name] for s in samples if name in s.media]) for name in names}
    if media:
        media["mm_token_type_ids"] = torch.cat([one.token_types for one in samples], dim=1)
    generator = torch.Generator().manual_seed(seed)
    return packed_row([one.ids for one in samples], keep=keep, generator=generator, media=media)


def _join(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim == 5:  # several images of one sequence
        return torch.cat(list(parts), dim=1)
    if parts[0].ndim == 1:  # a number for each
        return torch.cat(list(parts))
    widest = max(part.shape[-1] for part in parts)  # sounds of unequal length
    return torch.cat([torch.nn.functional.pad(p, (0, widest - p.shape[-1])) for p in parts])


def reference_loss(
    model: hf.PreTrainedModel, samples: Sequence[MediaSample], batch: MicroBatch
) -> Tensor:
    """The mean loss of the packed samples by transformers alone, one sequence at a time."""
    total = torch.zeros(())
    takes_types = model.config.model_type.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
    takes_types |= model.config.model_type.startswith("qwen3_5")
    for one, a, b in zip(samples, batch.bounds, batch.bounds[1:], strict=False):
        more: dict[str, Any] = {"mm_token_type_ids": one.token_types} if takes_types else {}
        if model.config.model_type == "gemma3":
            more["token_type_ids"] = one.token_types
        more |= {"use_audio_in_video": True} if one.has_tracks else {}
        logits = model(
            input_ids=one.ids[None],
            attention_mask=torch.ones_like(one.ids)[None],
            use_cache=False,
            **one.media,
            **more,
        ).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0].float(), batch.labels[0, a:b], ignore_index=IGNORE, reduction="sum"
        )
    return total / max(1, batch.counts["tokens"])
