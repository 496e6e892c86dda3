"""What `examples/digits.py` writes is what a model is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import AutoConfig

from omnilit.config.media import MediaConfig
from omnilit.data.collate import CollateSettings, collate
from omnilit.data.media.processor import MediaProcessor, load_processor
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.types import IGNORE, Origin, Record
from tests.helpers.examples import load_example


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("digits")


@pytest.fixture(scope="module")
def written(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    example.write_all(out, films=12, tones=42)
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


def test_films_show_the_digits_that_are_named_and_held_out_ones_where_these_are_asked(
    example: Any, written: Path
):
    images, labels = example.load_images()
    known = {np.asarray(image.convert("RGB")).tobytes(): i for i, image in enumerate(images)}
    for split, number in (("train", 10), ("eval", 2)):
        found = rows(written / f"video_{split}.jsonl")
        assert len(found) == number
        for row in found:
            asked, said = row.fields["messages"]
            with av.open(str(written / asked["content"][0]["video"])) as film:
                frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
            shown = [known[frame.tobytes()] for frame in frames]
            first, second = shown[0], shown[4]
            assert shown == [first] * 4 + [second] * 4
            assert said["content"][0]["text"] == f"{labels[first]} {labels[second]}"
            assert {example.is_held_out(i) for i in shown} == {split == "eval"}


def test_tones_have_the_pitch_of_their_note(example: Any, written: Path):
    for split in ("train", "eval"):
        found = rows(written / f"audio_{split}.jsonl")
        assert {row.fields["messages"][1]["content"][0]["text"] for row in found} == {*"CDEFGA"}
        for row in found:
            asked, said = row.fields["messages"]
            wave, rate = soundfile.read(written / asked["content"][0]["audio"])
            strongest = np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)
            assert abs(strongest - example.NOTES[said["content"][0]["text"]]) < 2  # of 2 Hz a bin


def test_the_model_that_hears_has_the_ids_of_its_own_tokenizer(written: Path):
    config = AutoConfig.from_pretrained(written / "omni")
    media = MediaProcessor(load_processor(str(written / "omni")), MediaConfig())
    assert {kind: [getattr(config, f"{kind}_token_index")] for kind in media.tokens} == media.places
    find = media.processor.tokenizer.convert_tokens_to_ids
    assert set(media.tokens) == {"image", "video", "audio"}
    for edge in ("vision_start", "vision_end", "audio_start", "audio_end"):
        assert getattr(config, f"{edge}_token_id") == find(f"<|{edge}|>")
