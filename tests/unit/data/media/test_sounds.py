"""Sounds: of any rate, brought to that of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omnilit.data.collate import CollateSettings, collate
from omnilit.data.media.processor import check_hearing
from omnilit.data.media.sounds import count_samples, read_sound
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import ConfigError, DataError
from omnilit.types import Medium, Origin
from tests.helpers.processors import media_processor, seen

ANSWER = {"role": "assistant", "content": "A."}


def tone(rate: int, seconds: float, channels: int = 1) -> Any:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_sounds_of_any_rate_are_the_same_tone(tmp_path: Path, rate: int, suffix: str):
    soundfile.write(tmp_path / f"a.{suffix}", tone(rate, 0.5, channels=2), rate)
    medium = Medium("audio", path=f"a.{suffix}")
    origin = Origin("", str(tmp_path / "d.jsonl"), 1)
    number = count_samples(medium, origin, 16_000)
    assert abs(number - 8000) <= 1
    samples = read_sound(medium, origin, 16_000, number)
    assert samples.shape == (number,)
    strengths = np.abs(np.fft.rfft(samples[:8000]))
    assert strengths.argmax() == 220  # of half a second
    assert np.abs(samples[1000:7000]).max() == pytest.approx(0.5, abs=0.08)


def test_records_of_mixed_rates_make_one_row(tmp_path: Path):
    media = media_processor("Qwen2_5Omni")
    records = []
    for index, (rate, seconds) in enumerate([(8000, 0.5), (44_100, 1.0), (16_000, 0.25)]):
        name = f"{index}.wav"
        soundfile.write(tmp_path / name, tone(rate, seconds), rate)
        content = [{"type": "audio", "audio": name}, {"type": "text", "text": "Which note?"}]
        records.append(seen(tmp_path, messages=[{"role": "user", "content": content}, ANSWER]))
    transform = build_transform(TransformSettings(), media.processor.tokenizer, media)
    samples = transform.encode(records).samples
    batch = collate(samples, CollateSettings(media=media))
    frames = batch.media["feature_attention_mask"].sum(-1)
    assert frames.tolist() == [50, 100, 25]
    assert batch.media["input_features"].shape[:2] == (3, 16)
    places = int((batch.input_ids == media.places["audio"][0]).sum())
    assert places == sum(sample.media[0].num_tokens for sample in samples)
    assert batch.modalities == {"audio"}


def test_what_is_no_sound_is_refused(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"RIFF nothing")
    soundfile.write(tmp_path / "empty.wav", tone(8000, 0.0), 8000)
    origin = Origin("", str(tmp_path / "d.jsonl"), 4)
    for name, message in (("a.wav", "cannot be decoded"), ("empty.wav", "it has no sound")):
        with pytest.raises(DataError, match=message) as caught:
            count_samples(Medium("audio", path=name), origin, 16_000)
        assert str(caught.value).startswith(f"{tmp_path}/d.jsonl:4: {name}: ")


def test_another_rate_than_the_model_hears_is_refused():
    check_hearing(media_processor("Qwen2_5Omni"))
    with pytest.raises(ConfigError, match=r"sample_rate: 8000 samples a second.*hears 16000"):
        check_hearing(media_processor("Qwen2_5Omni", sample_rate=8000))
