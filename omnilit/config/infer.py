"""`infer`: generation with a trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class InferArguments:
    """Which model answers, and how its tokens are chosen.

    Args:
        model_path: Folder (or hub id) of the model in the Hugging Face layout.
        tokenizer_path: Folder (or hub id) of the tokenizer; `model_path` when null.
        seed: Seed of the sampling.
        do_sample: Draw tokens at random; false takes the likeliest each time.
        temperature: Divides the logits before sampling; below 1 sharpens.
        top_p: Sample among the likeliest tokens that reach this probability together.
        max_tokens: Longest answer, in tokens.
        mm_configs: How images, videos and sounds are prepared, as `data.mm_configs` says it.
    """

    model_path: str
    tokenizer_path: str | None = None
    seed: int = 42
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    mm_configs: dict[str, Any] | None = field(default_factory=dict)
