"""What `examples/digits.py` writes is what a model is trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig

from omnilit.config.media import MediaConfig
from omnilit.data.collate import CollateSettings, collate
from omnilit.data.media.processor import MediaProcessor, load_processor
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.types import IGNORE, Origin, Record

FILE = Path(__file__).parents[3] / "examples" / "digits.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("digits", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("digits")
    vars(module).update(FILMS=7, TONES=42)
    module.main(["--out", str(out), "--omni"])
    return out


def rows(file: Path) -> list[Record]:
    lines = file.read_text().splitlines()
    return [Record(json.loads(line), Origin("", str(file), i + 1)) for i, line in enumerate(lines)]


def test_no_held_out_image_is_trained_and_both_hold_every_digit(written: Path):
    images = {}
    for split in ("train", "eval"):
        found = rows(written / f"{split}.jsonl")
        names = [row.fields["messages"][0]["content"][0]["image"] for row in found]
        answers = {row.fields["messages"][1]["content"][0]["text"] for row in found}
        assert answers == set("0123456789")
        images[split] = set(names)
    assert len(images["train"]) == 1497
    assert len(images["eval"]) == 300
    assert not images["train"] & images["eval"]
    assert np.asarray(Image.open(written / "images" / "0000.png")).shape == (32, 32)


def test_tokens_fit_the_model_and_only_the_digit_is_trained(written: Path):
    media = MediaProcessor(load_processor(str(written / "model")), MediaConfig())
    tokenizer = media.processor.tokenizer
    config = AutoConfig.from_pretrained(written / "model")
    assert len(tokenizer) <= config.text_config.vocab_size
    transform = build_transform(TransformSettings(), tokenizer, media)
    records = rows(written / "eval.jsonl")[:20]
    samples = transform.encode(records).samples
    for record, sample in zip(records, samples, strict=True):
        transform.check(record)
        said = sample.input_ids[sample.labels != IGNORE]
        answer = record.fields["messages"][1]["content"][0]["text"]
        assert tokenizer.decode(said) == f"{answer}<|im_end|>"
        assert len(said) == 2
    batch = collate(samples, CollateSettings(media=media))
    assert int((batch.input_ids == config.image_token_id).sum()) == 20 * 4
    assert batch.media["image_grid_thw"].tolist() == [[1, 4, 4]] * 20
