"""Videos with their sound: places, features and times are those of transformers' processor."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from omnilit.data.collate import CollateSettings, collate
from omnilit.data.media.processor import MediaProcessor, check_hearing
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import ConfigError, DataError
from omnilit.types import MicroBatch, Sample
from tests.helpers.films import RATE, SIDE, tone, write_film
from tests.helpers.processors import OMNI, Family, media_processor, seen

ANSWER = {"role": "assistant", "content": "An A."}


def encode(
    media: MediaProcessor, folder: Path, *parts: dict[str, Any], limit: int = 4000
) -> Sample:
    messages = [{"role": "user", "content": list(parts)}, ANSWER]
    settings = TransformSettings(max_seq_len=limit, truncation_side="left")
    transform = build_transform(settings, media.processor.tokenizer, media)
    record = seen(folder, messages=messages)
    transform.check(record)
    (sample,) = transform.encode([record]).samples
    return sample


def load(media: MediaProcessor, *samples: Sample) -> MicroBatch:
    return collate(list(samples), CollateSettings(media=media))


def video(name: str) -> dict[str, Any]:
    return {"type": "video", "video": name}


@pytest.mark.parametrize("family", OMNI)
def test_a_video_and_its_sound_are_what_transformers_makes_of_frames_and_samples(
    tmp_path: Path, family: Family
):
    media = media_processor(family, use_audio_in_video=True, fps=4.0)
    sound = tone(3.0)
    name = write_film(tmp_path / "a.mkv", 24, sound)
    text = {"type": "text", "text": "Which note?"}
    sample = encode(media, tmp_path, video(name), text)
    batch = load(media, sample)
    whole: Any = media.processor
    frames = np.stack([np.full((SIDE, SIDE, 3), 4 * k, np.uint8) for k in shown(12, 24)])
    messages = [{"role": "user", "content": [video(name), text]}, ANSWER]
    expected = whole(
        text=[whole.apply_chat_template(messages)],
        videos=[torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())],
        audio=[sound.astype(np.float32) / 2**15],
        load_audio_from_video=True,
        audio_from_video_indices=[0],
        do_sample_frames=False,
        fps=4.0,
        sampling_rate=RATE,
        return_tensors="pt",
    )
    assert torch.equal(batch.input_ids, expected["input_ids"])
    names = ("pixel_values_videos", "video_grid_thw", "feature_attention_mask")
    assert all(torch.equal(batch.media[name], expected[name]) for name in names)
    torch.testing.assert_close(batch.media["input_features"], expected["input_features"])
    assert batch.media["video_second_per_grid"].tolist() == [0.5]
    assert batch.modalities == {"video", "audio"}
    ids = batch.input_ids[0]
    places = [int((ids == media.places[kind][0]).sum()) for kind in ("video", "audio")]
    assert min(places) > 20
    assert sum(places) == sample.media[0].num_tokens
    changes = int((torch.isin(ids, torch.tensor(media.places["audio"])).diff() == 1).sum())
    assert changes > 2  # what is heard stands among what is seen at the same time


def shown(number: int, total: int) -> list[int]:
    return np.linspace(0, total - 1, number).round().astype(int).tolist()


@pytest.mark.parametrize("family", OMNI)
def test_sounds_of_a_row_stay_with_their_places(tmp_path: Path, family: Family):
    media = media_processor(family, use_audio_in_video=True, fps=2.0)
    names = [write_film(tmp_path / f"{i}.mkv", 8 + 8 * i, tone(1.0 + i)) for i in range(2)]
    with av.open(str(tmp_path / "b.wav"), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        heard = av.AudioFrame.from_ndarray(tone(0.5)[None], format="s16", layout="mono")
        heard.rate = RATE
        container.mux(stream.encode(heard))
    audio = {"type": "audio", "audio": "b.wav"}
    samples = [
        encode(media, tmp_path, video(names[0]), audio, video(names[1])),
        encode(media, tmp_path, {"type": "text", "text": "none"}),
        encode(media, tmp_path, audio, video(names[0])),
    ]
    batch, alone = load(media, *samples), [load(media, samples[i]) for i in (0, 2)]
    assert [len(one.media) for one in samples] == [3, 0, 2]
    frames = [100, 50, 200, 50, 100]  # of the sounds in the order of their places
    assert batch.media["feature_attention_mask"].sum(-1).tolist() == frames
    expected = torch.cat([one.media["video_second_per_grid"] for one in alone])
    assert torch.equal(batch.media["video_second_per_grid"], expected)
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(batch.media[name], torch.cat([one.media[name] for one in alone]))


def test_a_sound_is_heard_with_its_video_at_any_rate_and_in_one_channel(tmp_path: Path):
    media = media_processor("Qwen3OmniMoe", use_audio_in_video=True)
    stereo = encode(
        media, tmp_path, video(write_film(tmp_path / "a.mkv", 16, tone(2.0), channels=2))
    )
    mono = encode(media, tmp_path, video(write_film(tmp_path / "b.mkv", 16, tone(2.0))))
    one, other = (load(media, sample).media["input_features"] for sample in (stereo, mono))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_video_that_does_not_fit_loses_its_sound_and_both_their_marks(tmp_path: Path):
    media = media_processor("Qwen3OmniMoe", use_audio_in_video=True)
    film = video(write_film(tmp_path / "a.mkv", 16, tone(2.0)))
    parts = (film, {"type": "text", "text": "So?"}, film)
    whole, kept = len(encode(media, tmp_path, *parts)), set()
    for limit in range(whole // 4, whole + 1, 7):
        sample = encode(media, tmp_path, *parts, limit=limit)
        assert len(sample) <= limit
        places = int(media.is_place(sample.input_ids).sum())
        assert places == sum(one.num_tokens for one in sample.media)
        said = media.processor.tokenizer.decode(sample.input_ids)
        marks = ("vision_start", "audio_start", "audio_end", "vision_end")
        assert {said.count(f"<|{mark}|>") for mark in marks} == {len(sample.media)}
        load(media, sample)
        kept.add(len(sample.media))
    assert kept >= {0, 1}


def test_a_silent_video_is_seen_alone_and_not_beside_one_with_a_sound(tmp_path: Path):
    silent = write_film(tmp_path / "silent.mkv", 16, None)
    loud = write_film(tmp_path / "loud.mkv", 16, tone(2.0))
    deaf, media = (
        media_processor("Qwen2_5Omni", use_audio_in_video=flag) for flag in (False, True)
    )
    samples = [encode(one, tmp_path, video(silent)) for one in (deaf, media)]
    assert (samples[0].input_ids == samples[1].input_ids).all()
    assert load(media, samples[1]).modalities == {"video"}
    both = load(media, samples[1], encode(media, tmp_path, video(loud)))
    assert both.media["feature_attention_mask"].sum(-1).tolist() == [200]
    assert len(both.media["video_grid_thw"]) == 2
    with pytest.raises(DataError, match=r"data\.jsonl:3: some of its videos have a sound"):
        encode(media, tmp_path, video(silent), video(loud))


def test_sounds_of_videos_are_refused_by_name_where_the_model_hears_none():
    check_hearing(media_processor("Qwen2_5Omni", use_audio_in_video=True))
    with pytest.raises(ConfigError, match=r"use_audio_in_video: Qwen3VLProcessor takes no sound"):
        check_hearing(media_processor("Qwen3VL", use_audio_in_video=True))
