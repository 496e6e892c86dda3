"""Preference pairs, and a model with weights to compare answers by."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import training


def write_weights_and_pairs(folder: Path) -> None:
    """`weights/`, a tiny model with the same weights each time, `train.jsonl` and `eval.jsonl`."""
    training.write_model(folder / "weights")
    config = AutoConfig.from_pretrained(folder / "weights")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "weights")
    for name, number in (("train", 30), ("eval", 7)):
        write_pairs(folder / f"{name}.jsonl", number)


def write_pairs(file: Path, number: int) -> None:
    """Pairs of answers of very different lengths; chosen ones have words of their own."""
    draw = random.Random(number)
    words = {"chosen": training.WORDS[:5], "rejected": training.WORDS[5:]}

    def talk(role: str, words: tuple[str, ...]) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(1, 9)))}

    with file.open("w") as lines:
        for _ in range(number):
            asked = talk("user", training.WORDS)
            pair = {name: [asked, talk("assistant", own)] for name, own in words.items()}
            lines.write(json.dumps(pair) + "\n")
