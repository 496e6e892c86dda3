"""Models that see, with processors that fit them, and questions about images, for whole runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from transformers import AutoModelForImageTextToText

from omnilit.types import MODALITIES, MicroBatch
from tests.helpers.media_models import media_config
from tests.helpers.processors import Family, build_processor, write_image

Model = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni_thinker"]
PROCESSORS: Final[dict[Model, Family]] = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VL",
    "qwen2_5_omni_thinker": "Qwen2_5Omni",
}
EDGES: Final = ("vision_start", "vision_end", "audio_start", "audio_end")
VOCAB: Final = 300
ROW: Final = 96
_FRAME: Final = 21  # tokens that the template adds to a question and its answer
_SIZES: Final = ((64, 64), (64, 64), (64, 96), (96, 64), (96, 96))
SIDE: Final = 64  # pixels: 4 places
ANSWERS: Final = ("Red.", "It is green.", "I see blue there.")
Seen = Counter[tuple[str, float]]


def write_seeing_model(
    folder: Path, name: Model = "qwen3_vl", *, has_weights: bool = False
) -> Path:
    """A folder with a tiny model and the processor that fits it."""
    processor: Any = build_processor(PROCESSORS[name])
    processor.save_pretrained(folder)
    config: Any = media_config(name, vocab=VOCAB)
    find = processor.tokenizer.convert_tokens_to_ids
    for kind in (kind for kind in MODALITIES if hasattr(config, f"{kind}_token_id")):
        setattr(config, f"{kind}_token_id", find(f"<|{kind}_pad|>"))
    for edge in (edge for edge in EDGES if hasattr(config, f"{edge}_token_id")):
        setattr(config, f"{edge}_token_id", find(f"<|{edge}|>"))
    patch = config.vision_config.patch_size = processor.image_processor.patch_size
    if hasattr(config.vision_config, "window_size"):
        config.vision_config.window_size = 4 * patch
    if has_weights:
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def ask(*parts: dict[str, Any], answer: str = ANSWERS[0]) -> dict[str, Any]:
    """A record of one question."""
    said = {"role": "assistant", "content": answer}
    return {"messages": [{"role": "user", "content": list(parts)}, said]}


def write_questions(file: Path, number: int) -> Path:
    """Questions about images, each of a grey of its own; every third has none, some have two."""
    rows = []
    for index in range(number):
        names = [f"{file.stem}_{index}_{at}.png" for at in range((0, 1, 2, 0, 1, 1)[index % 6])]
        for at, name in enumerate(names):
            grey = 2 * index + at
            pixels = np.full((SIDE, SIDE * (1 + index % 2), 3), grey, np.uint8)
            Image.fromarray(pixels).save(file.parent / name)
        text = {"type": "text", "text": "What is it? "[: 1 + index % 12]}
        images = [{"type": "image", "image": name} for name in names]
        rows.append(ask(*images, text, answer=ANSWERS[index % len(ANSWERS)]))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_ragged_questions(file: Path) -> Path:
    """Records of which 33 rows of `ROW` tokens are made; a third of them has no image.

    27 fill one each, 12 half of one; the labels stand at their ends.
    """
    draw, rows = random.Random(0), []
    for index in range(39):
        length = draw.randint(*((65, ROW) if index < 27 else (40, ROW // 2)))
        answer = draw.choice(ANSWERS[: 3 if index < 27 else 1])
        length -= _FRAME + len(answer)
        sizes = draw.choices(_SIZES, k=draw.randint(1, 5)) if index % 3 else []
        images = []
        for at, (height, width) in enumerate(sizes):
            places = height * width // 32**2
            if length <= places + 2:
                continue
            length -= places + 2  # with what stands around them
            name = f"{file.stem}_{index}_{at}.png"
            write_image(file.parent / name, height, width, seed=10 * index + at)
            images.append({"type": "image", "image": name})
        text = {"type": "text", "text": "".join(draw.choices("abcdefgh", k=length))}
        rows.append(ask(*images, text, answer=answer))
    draw.shuffle(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class SeenSteps(Callback):
    """Notes which records and images this rank has in each step."""

    def __init__(self) -> None:
        self.by_step: list[Seen] = []
        self._open: Seen = Counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        self._open.update(("row", float(origin.row)) for origin in batch.origins)
        self._open.update(("image", mean) for mean in means(batch))
        assert batch.stamp is not None
        if batch.stamp.index == batch.stamp.size - 1:
            self.by_step.append(self._open)
            self._open = Counter()


def means(batch: MicroBatch) -> list[float]:
    """The mean of what the model is given of each image of a micro-batch: tells them apart."""
    if "image_grid_thw" not in batch.media:
        return []
    sizes = batch.media["image_grid_thw"].prod(-1).tolist()
    return [round(float(part.mean()), 3) for part in batch.media["pixel_values"].split(sizes)]
