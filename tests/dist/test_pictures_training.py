"""A model whose image tokens see each other, from records to steps: one process and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from omnilit.modules import VLMModule
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.media_models import media_config
from tests.helpers.media_runs import VOCAB, write_questions
from tests.helpers.processors import build_picture_processor

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Gemma 3 with its processor, and questions of which a third has no image."""
    folder = tmp_path_factory.mktemp("gemma3")
    processor: Any = build_picture_processor("Gemma3")
    processor.save_pretrained(folder / "model")
    config: Any = media_config("gemma3", vocab=VOCAB)
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<soft>")
    config.vision_config.image_size = 32
    config.save_pretrained(folder / "model")
    write_questions(folder / "train.jsonl", 24)
    return folder


def run(folder: Path, out: str, sizes: dict[str, Any]) -> list[tuple[int, float, float, int]]:
    """A pass, and its export."""
    arguments = training.arguments(
        folder / out, accelerator=sizes, micro_batch_size=1, global_batch_size=2
    )
    data = {"max_seq_len": 160, "train_size": None}
    log, module = training.train(folder, arguments, module_class=VLMModule, data=data)
    module.export_weights(folder / out / "hf_ckpt")
    return training.numbers(log)


def run_two(folder: Path) -> list[list[tuple[int, float, float, int]]]:
    return [run(folder, "shards", {}), run(folder, "matrices", {"tp_size": 2})]


def test_two_ranks_train_the_steps_of_one_and_transformers_loads_what_they_export(folder, tmp_path):
    one = run_ranks(run, 1, folder, "one", {}, tmp_path=tmp_path / "one")[0]
    assert len(one) > 1
    for rank in run_ranks(run_two, 2, folder, tmp_path=tmp_path / "two", timeout_s=100):
        for found in rank:
            for mine, theirs in zip(found, one, strict=True):
                assert (mine[0], mine[3]) == (theirs[0], theirs[3])
                assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
    answers = [answer(folder / out / "hf_ckpt") for out in ("one", "shards", "matrices")]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[2], answers[0], rtol=1e-4, atol=1e-5)


def answer(export: Path) -> torch.Tensor:
    """Logits of plain transformers for a question about a picture."""
    from PIL import Image

    processor: Any = AutoProcessor.from_pretrained(export)
    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    inputs = processor(text=text, images=[Image.new("RGB", (40, 32), "red")], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits
