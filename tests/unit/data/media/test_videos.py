"""Videos: which frames are taken, when they were, and what the model is given of them."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import av
import numpy as np
import pytest
import soundfile
import torch

from omnilit.data.collate import CollateSettings, collate
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.media.torchcodec_frames import find_torchcodec
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import DataError
from omnilit.types import MicroBatch, Sample
from tests.helpers.films import SIDE, write_film
from tests.helpers.processors import OMNI, Family, media_processor, seen, write_image

ANSWER = {"role": "assistant", "content": "Yes."}


def run(media: MediaProcessor, folder: Path, **part: Any) -> tuple[Sample, MicroBatch]:
    messages = [{"role": "user", "content": [{"type": "video", **part}]}, ANSWER]
    settings = TransformSettings(max_seq_len=4000)
    transform = build_transform(settings, media.processor.tokenizer, media)
    (sample,) = transform.encode([seen(folder, messages=messages)]).samples
    return sample, collate([sample], CollateSettings(media=media))


def greys(batch: MicroBatch) -> list[float]:
    """The grey of each pair of frames, times 255 / 4."""
    pixels = batch.media["pixel_values_videos"]
    grid = batch.media["video_grid_thw"][0].tolist()
    frames = pixels.reshape(grid[0], -1, 3, 2, pixels.shape[1] // 6)
    both = frames.mean(dim=(1, 2, 4)) * 0.5 + 0.5
    return (both * 255 / 4).reshape(-1).tolist()


class StandIn:
    """What is used of torchcodec's decoder, over PyAV."""

    def __init__(self, source: Any, *, transforms: list[Any]) -> None:
        (self.size,) = transforms
        container: Any
        with av.open(source) as container:
            self.frames: list[Any] = list(container.decode(video=0))
        rate = self.frames[1].pts * self.frames[0].time_base if len(self.frames) > 1 else 1
        self.times = [float(frame.pts * frame.time_base) for frame in self.frames]
        end = self.times[-1] + float(rate)
        self.metadata = SimpleNamespace(begin_stream_seconds=0.0, end_stream_seconds=end)

    def get_frames_played_at(self, seconds: list[float]) -> Any:
        height, width = self.size
        if max(seconds) >= self.metadata.end_stream_seconds:
            raise RuntimeError("it has ended by then")
        places = [int(np.searchsorted(self.times, time, "right")) - 1 for time in seconds]
        pixels = [
            self.frames[at].to_ndarray(width=width, height=height, format="rgb24") for at in places
        ]
        return SimpleNamespace(data=torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2)))


@pytest.fixture(params=["PyAV", "stand-in", "torchcodec"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What decodes frames."""
    if request.param == "torchcodec":
        pytest.importorskip("torchcodec", reason="torchcodec is not installed, see docs/data.md")
    elif request.param == "PyAV":
        monkeypatch.setitem(sys.modules, "torchcodec", None)
        for part in ("decoders", "transforms"):
            monkeypatch.delitem(sys.modules, f"torchcodec.{part}", raising=False)
    else:
        decoders, transforms = ModuleType("decoders"), ModuleType("transforms")
        monkeypatch.setattr(decoders, "VideoDecoder", StandIn, raising=False)
        monkeypatch.setattr(transforms, "Resize", tuple, raising=False)
        monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
        monkeypatch.setitem(sys.modules, "torchcodec.transforms", transforms)
    find_torchcodec.cache_clear()
    assert (find_torchcodec() is None) == (request.param == "PyAV")
    yield request.param
    find_torchcodec.cache_clear()


def test_a_torchcodec_that_does_not_run_is_told_and_pyav_decodes(monkeypatch, caplog):
    broken = ModuleType("torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec", broken)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # as where no ffmpeg is found
    find_torchcodec.cache_clear()
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    assert find_torchcodec() is None
    assert "torchcodec is installed and does not run" in caplog.text
    find_torchcodec.cache_clear()


@pytest.mark.usefixtures("decoder")
def test_a_damaged_video_names_its_record(tmp_path: Path):
    name = write_film(tmp_path / "a.mp4", 41, fps=10, codec="libx264")
    whole = (tmp_path / name).read_bytes()
    media = media_processor("Qwen3VL")
    sample, _ = run(media, tmp_path, video=name)
    (tmp_path / name).write_bytes(whole[:700])  # since it was prepared
    with pytest.raises(DataError, match=r"a\.mp4: it cannot be decoded"):
        collate([sample], CollateSettings(media=media))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
@pytest.mark.parametrize("settings", [{"fps": 2.0}, {"frames": 6}, {"fps": 4.0, "max_frames": 8}])
def test_written_times_are_those_of_the_frames_that_are_seen(tmp_path, codec, settings):
    fps, number = 10, 41
    name = write_film(
        tmp_path / f"a.{'mkv' if codec == 'ffv1' else 'mp4'}", number, fps=fps, codec=codec
    )
    media = media_processor("Qwen3VL", **settings)
    sample, batch = run(media, tmp_path, video=name)
    text = media.processor.tokenizer.decode(sample.input_ids)
    times = [float(time) for time in re.findall(r"<([\d.]+) seconds>", text)]
    seen_greys = np.array(greys(batch)).reshape(-1, 2)
    assert len(times) == len(seen_greys) == batch.media["video_grid_thw"][0, 0]
    shown = seen_greys.mean(axis=1) / fps  # frame k has the grey k and the time k / fps
    assert shown == pytest.approx(times, abs=0.051 + (0.05 if codec == "libx264" else 0))
    indices = json.loads(sample.media[0].plan)["indices"]
    assert seen_greys.reshape(-1) == pytest.approx(indices, abs=0.8 if codec == "libx264" else 0.1)
    assert (indices[0], indices[-1]) == (0, number - 1)


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", *OMNI])
def test_places_and_tensors_agree(tmp_path: Path, family: Family):
    name = write_film(tmp_path / "a.mkv", 11, fps=5)
    media = media_processor(family)
    sample, batch = run(media, tmp_path, video=name)
    grid = batch.media["video_grid_thw"][0]
    places = int((batch.input_ids == media.places["video"][0]).sum())
    assert places == int(grid.prod()) // 4 == sample.media[0].num_tokens
    assert len(batch.media["pixel_values_videos"]) == int(grid.prod())
    assert batch.modalities == {"video"}
    seconds = {"Qwen2_5_VL": "second_per_grid_ts"} | dict.fromkeys(OMNI, "video_second_per_grid")
    if family in seconds:  # 4 frames of 2.2 seconds, two a step
        assert batch.media[seconds[family]].tolist() == pytest.approx([1.1])


def test_a_list_of_images_is_a_video_of_its_own_rate(tmp_path: Path):
    names = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    media = media_processor("Qwen3VL", fps=1.0)
    sample, batch = run(media, tmp_path, video=names, fps=1)
    text = media.processor.tokenizer.decode(sample.input_ids)
    assert re.findall(r"<([\d.]+) seconds>", text) == ["0.5", "2.5"]
    assert batch.media["video_grid_thw"].tolist() == [[2, 4, 6]]
    write_image(tmp_path / "1.png", 32, 32)
    with pytest.raises(DataError, match="its frames have 2 sizes"):
        run(media, tmp_path, video=names)


def test_frames_are_brought_to_a_share_of_all_pixels(tmp_path: Path):
    name = write_film(tmp_path / "a.mkv", 16, fps=4)
    media = media_processor(
        video_total_pixels=8 * 32 * 32, video_min_pixels=900, scale_factor=32, fps=2.0
    )
    sample, batch = run(media, tmp_path, video=name)
    plan = json.loads(sample.media[0].plan)
    assert len(plan["indices"]) == 8
    assert plan["size"] == [32, 32]
    assert batch.media["video_grid_thw"].tolist() == [[4, 2, 2]]


def test_a_video_of_one_frame_is_long_enough_for_the_model(tmp_path: Path):
    name = write_film(tmp_path / "a.mkv", 1, fps=4)
    sample, batch = run(media_processor("Qwen3VL"), tmp_path, video=name)
    assert json.loads(sample.media[0].plan)["indices"] == [0, 0]
    assert batch.media["video_grid_thw"].tolist() == [[1, 4, 4]]
    assert torch.isfinite(batch.media["pixel_values_videos"]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "cannot be decoded"), (b"no video at all" * 100, "cannot be decoded")],
)
def test_a_video_that_cannot_be_used_is_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        run(media_processor(), tmp_path, video="a.mp4")
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl:3: a.mp4: ")


def test_a_video_without_frames_is_refused(tmp_path: Path):
    write_film(tmp_path / "a.mkv", 0, fps=4)
    with pytest.raises(DataError, match=r"a\.mkv: it (has no frames|cannot be decoded)"):
        run(media_processor(), tmp_path, video="a.mkv")
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    with pytest.raises(DataError, match=r"a\.wav: it has no video"):
        run(media_processor(), tmp_path, video="a.wav")


@pytest.mark.parametrize("family", OMNI)
@pytest.mark.parametrize("bound", ["video_max_pixels", "video_total_pixels"])
def test_a_bound_above_holds_where_the_processor_enlarges_what_is_small(
    tmp_path: Path, family: Family, bound: str
):
    name = write_film(tmp_path / "a.mkv", 4, fps=2)
    free, _ = run(media_processor(family), tmp_path, video=name)
    media = media_processor(family, **{bound: 4 * SIDE**2 if "total" in bound else SIDE**2})
    sample, batch = run(media, tmp_path, video=name)
    assert batch.media["video_grid_thw"].tolist() == [[2, 4, 4]]  # patches of 14 pixels
    assert len(sample.input_ids) < len(free.input_ids) - 200


@pytest.mark.parametrize("family", get_args(Family))
def test_places_of_images_and_videos_come_of_formulas(family: Family):
    media = media_processor(family)
    assert media._has_image_formula
    assert media._has_video_formula


def test_a_formula_that_knows_no_cap_of_long_videos_is_not_asked():
    media = media_processor("Qwen2VL")
    media.processor.video_processor.cap_pixels_per_frame = True
    assert not media._has_video_formula
