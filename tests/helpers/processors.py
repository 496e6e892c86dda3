"""Tiny processors of families that see and hear, built offline."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from omnilit.config.media import MediaConfig
from omnilit.data.media.processor import MediaProcessor
from omnilit.types import Origin, Record

Family = Literal["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen2_5Omni", "Qwen3OmniMoe"]
PictureFamily = Literal["Llava", "Gemma3", "InternVL"]
OMNI = ("Qwen2_5Omni", "Qwen3OmniMoe")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
)
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_vision_tokenizer(
    named: Mapping[str, str] = MappingProxyType({}), place: str = PLACE
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, with the special tokens of Qwen's models, 266 of them, and others.

    Args:
        named: Further special tokens, by the attribute that holds each.
        place: What the template writes for an image.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, *named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.replace(PLACE, place),
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "audio_token": "<|audio_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
            **named,
        },
    )


def build_processor(family: Family = "Qwen3VL") -> ProcessorMixin:
    """A processor that makes 1 to 64 places of an image."""
    patch = 16 if family == "Qwen3VL" else 14
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    images = hf.Qwen2VLImageProcessor(patch_size=patch, size=size)
    kind: Any = hf.Qwen3VLVideoProcessor if family == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    videos = kind(patch_size=patch, size=size, cap_pixels_per_frame=False)
    tokenizer = build_vision_tokenizer()
    build: Any = getattr(hf, f"{family}Processor")
    if family in OMNI:
        ears = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=4, padding_side="right")
        return build(images, videos, ears, tokenizer, chat_template=TEMPLATE)
    return build(images, tokenizer, videos, chat_template=TEMPLATE)


def build_picture_processor(family: PictureFamily) -> ProcessorMixin:
    """A processor that makes whole pictures of 32 pixels a side, 4 or more places of each."""
    size = {"height": 32, "width": 32}
    if family == "Llava":
        tokenizer = build_vision_tokenizer({"image_token": "<image>"}, "<image>")
        images: Any = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        more: dict[str, Any] = {"patch_size": 8, "num_additional_image_tokens": 1}
        more |= {"vision_feature_select_strategy": "default"}
    elif family == "Gemma3":
        names = {"image_token": "<soft>", "boi_token": "<start>", "eoi_token": "<end>"}
        tokenizer = build_vision_tokenizer(names, "<start>")
        images, more = hf.Gemma3ImageProcessor(size=size), {"image_seq_length": 4}
    else:
        sides = {"start_image_token": "<img>", "end_image_token": "</img>"}
        names = {**sides, "context_image_token": "<context>", "video_token": "<|video_pad|>"}
        tokenizer = build_vision_tokenizer(names, "<context>")
        videos = hf.InternVLVideoProcessor(size=size)
        images, more = hf.GotOcr2ImageProcessor(size=size), {"video_processor": videos}
        more |= {"image_seq_length": 4}
    build: Any = getattr(hf, f"{family}Processor")
    template = tokenizer.chat_template
    return build(image_processor=images, tokenizer=tokenizer, chat_template=template, **more)


def media_processor(family: Family = "Qwen3VL", **settings: Any) -> MediaProcessor:
    """`build_processor` with `data.mm_configs`."""
    return MediaProcessor(build_processor(family), MediaConfig(**settings))


def write_image(file: Path, height: int = 64, width: int = 96, seed: int = 0) -> str:
    """An image of noise in a file of any format; its name."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file.name


def png_head(height: int, width: int) -> bytes:
    """A PNG whose head alone is right."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"IHDR" + head, b"IDAT" + b"no pixels"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def seen(folder: Path, **fields: Any) -> Record:
    """A record of a file in `folder`, line 3."""
    return Record(fields, Origin("train", str(folder / "data.jsonl"), 3))
