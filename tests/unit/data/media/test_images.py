"""Records with images: their places in the text, and what the model is given of them."""

import base64
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omnilit.config.media import MediaConfig
from omnilit.data.cache import open_prepared
from omnilit.data.collate import CollateSettings, collate, filler
from omnilit.data.files import list_files
from omnilit.data.media.processor import MediaProcessor, find_processor
from omnilit.data.prepare import PrepareRequest, prepare
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import DataError
from omnilit.types import IGNORE, Sample
from tests.helpers.processors import (
    Family,
    build_picture_processor,
    build_processor,
    media_processor,
    png_head,
    seen,
    write_image,
)

ANSWER = {"role": "assistant", "content": "It is 7."}


def encode(media: MediaProcessor, *records, **settings) -> list[Sample]:
    given = TransformSettings(**{"max_seq_len": 400, **settings})
    transform = build_transform(given, media.processor.tokenizer, media)
    for record in records:
        transform.check(record)
    return transform.encode(records).samples


def ask(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}, ANSWER]


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}, ANSWER]


PLACE = {"type": "text", "text": "<|image_pad|>"}
IMAGE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen2_5Omni"])
def test_tokens_and_tensors_are_those_of_transformers_processor(tmp_path: Path, family: Family):
    media = media_processor(family)
    names = [write_image(tmp_path / "a.png"), write_image(tmp_path / "b.jpg", 200, 70, seed=1)]
    first, second = ({"type": "image", "image": name} for name in names)
    messages = ask({"type": "text", "text": "Which?"}, first, second, {"type": "text", "text": "!"})
    (sample,) = encode(media, seen(tmp_path, messages=messages))
    batch = collate([sample], CollateSettings(media=media))
    text = media.processor.apply_chat_template(messages)
    images = [Image.open(tmp_path / name).convert("RGB") for name in names]
    whole: Any = media.processor
    expected = whole(text=[text], images=images, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch.media[name], expected[name])
    assert batch.modalities == {"image"}
    if "mm_token_type_ids" in expected:
        assert torch.equal(batch.media["mm_token_type_ids"], expected["mm_token_type_ids"])
    said = media.processor.tokenizer.decode(sample.input_ids[sample.labels != IGNORE])
    assert said == "It is 7.<|im_end|>"


@pytest.mark.parametrize("family", ["Llava", "Gemma3", "InternVL"])
def test_tokens_and_tensors_of_whole_pictures_are_those_of_the_processor(tmp_path, family):
    media = MediaProcessor(build_picture_processor(family))
    names = [write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png", 200, 70, seed=1)]
    first, second = ({"type": "image", "image": name} for name in names)
    parts = [{"type": "text", "text": "Which?"}, first, second, {"type": "text", "text": "!"}]
    (sample,) = encode(media, seen(tmp_path, messages=ask(*parts)))
    batch = collate([sample], CollateSettings(media=media))
    processor: Any = media.processor
    bare = [{"type": part["type"], "text": part.get("text", "")} for part in parts]
    expected = processor(
        text=processor.apply_chat_template(ask(*bare)),
        images=[[Image.open(tmp_path / name) for name in names]],
        return_tensors="pt",
    )
    assert batch.input_ids.tolist() == expected.pop("input_ids").tolist()
    del expected["attention_mask"]
    assert expected.keys() == batch.media.keys()
    for name, value in expected.items():
        assert torch.equal(batch.media[name], value), name


def test_every_way_to_name_an_image_gives_the_same(tmp_path: Path):
    media = media_processor()
    name = write_image(tmp_path / "a.png")
    data = (tmp_path / name).read_bytes()
    coded = base64.b64encode(data).decode()
    parts = [
        {"type": "image", "image": name},
        {"type": "image", "path": str(tmp_path / name)},
        {"type": "image", "image": f"file://{tmp_path / name}"},
        {"type": "image", "image": data},
        {"type": "image", "image": {"bytes": data, "path": None}},
        {"type": "image", "base64": coded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        {"type": "image", "image": None, "url": name},
    ]
    records = [seen(tmp_path, messages=ask(part)) for part in parts]
    columns = [
        {"images": [name], "messages": [{"role": "user", "content": "<image>"}, ANSWER]},
        {"image": {"bytes": data}, "messages": ask({"type": "image"})},
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": "It is 7."},
            ],
        },
        {"images": [data], "instruction": "<image>", "output": "It is 7."},
    ]
    records += [seen(tmp_path, **fields) for fields in columns]
    samples = encode(media, *records)
    batches = [collate([sample], CollateSettings(media=media)) for sample in samples]
    assert len(batches) == len(parts) + len(columns)
    for batch in batches[1:]:
        assert torch.equal(batch.input_ids, batches[0].input_ids)
        assert torch.equal(batch.media["pixel_values"], batches[0].media["pixel_values"])


def test_prepared_samples_keep_their_media_and_follow_files_that_move(tmp_path, monkeypatch):
    media = media_processor()
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_image(old / "a.png")
    rows = [
        {"messages": ask(IMAGE)},
        {"messages": ask({"type": "text", "text": "Hello"})},
    ]
    (old / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder: Path):
        files = tuple(list_files(str(folder / "d.jsonl"), key="data.train_path"))
        request = PrepareRequest(files, TransformSettings(max_seq_len=200), tmp_path / "cache")
        info = prepare(request, media.processor.tokenizer, media=media)
        return info["path"], open_prepared(info["path"], files=info["files"])

    first, samples = run(old)
    assert [len(samples[i].media) for i in range(2)] == [1, 0]
    old.rename(new)
    second, samples = run(new)
    assert first == second  # nothing was prepared anew
    batch = collate([samples[0], samples[1]], CollateSettings(media=media))
    assert batch.media["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert batch.media["mm_token_type_ids"].sum() == 6
    other = MediaProcessor(media.processor, replace(media.config, image_max_pixels=4096))
    assert other.fingerprint() != media.fingerprint()


def test_a_row_of_several_samples_holds_their_images_in_order(tmp_path: Path):
    media = media_processor()
    sizes = [(32, 32), (64, 32), (96, 64)]
    for index, size in enumerate(sizes):
        write_image(tmp_path / f"{index}.png", *size)
    records = [seen(tmp_path, messages=ask({"type": "image", "image": f"{i}.png"})) for i in (2, 0)]
    records.append(seen(tmp_path, messages=ask({"type": "text", "text": "none"})))
    records.append(seen(tmp_path, messages=ask({"type": "image", "image": "1.png"})))
    batch = collate(encode(media, *records), CollateSettings(media=media, pad_to=500))
    assert batch.media["image_grid_thw"].tolist() == [[1, 6, 4], [1, 2, 2], [1, 4, 2]]
    assert batch.media["mm_token_type_ids"].shape == batch.input_ids.shape == (1, 500)
    assert int((batch.input_ids == media.places["image"][0]).sum()) == 6 + 1 + 2
    assert not filler(CollateSettings(media=media)).media
    text = encode(media, seen(tmp_path, messages=ask({"type": "text", "text": "none"})))
    assert not collate(text, CollateSettings(media=media)).media


def test_images_stand_upright_and_in_rgb(tmp_path: Path):
    media = media_processor()
    turned = Image.new("RGB", (96, 32), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    records = [
        seen(tmp_path, messages=ask({"type": "image", "image": name}))
        for name in ("turned.jpg", "clear.png", "white.png")
    ]
    batch = collate(encode(media, *records), CollateSettings(media=media))
    assert batch.media["image_grid_thw"].tolist() == [[1, 6, 2], [1, 2, 2], [1, 2, 2]]
    pixels = batch.media["pixel_values"]
    assert torch.equal(pixels[12:16], pixels[16:20])  # what is clear shows white


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", range(30, 100, 7))
def test_what_is_too_long_never_keeps_a_part_of_an_image(tmp_path: Path, side, limit):
    media = media_processor()
    write_image(tmp_path / "a.png", 128, 128)  # 16 places
    image = {"type": "image", "image": "a.png"}
    words = {"type": "text", "text": "Look at this."}
    messages = ask(words, image, words, image, words)
    record = seen(tmp_path, messages=messages)
    settings = {"max_seq_len": limit, "truncation_side": side}
    for sample in encode(media, record, **settings):
        assert len(sample) <= limit
        places = int(media.is_place(sample.input_ids).sum())
        assert places == 16 * len(sample.media)
        text = media.processor.tokenizer.decode(sample.input_ids)
        assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == len(sample.media)
        collate([sample], CollateSettings(media=media))


def test_images_beyond_the_limit_of_a_record_lose_their_places(tmp_path: Path):
    media = media_processor(max_image_nums=1)
    write_image(tmp_path / "a.png", 32, 32)
    write_image(tmp_path / "b.png", 64, 64)
    parts = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    (sample,) = encode(media, seen(tmp_path, messages=ask(*parts)))
    assert [medium.path for medium in sample.media] == ["a.png"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no image that Pillow knows"),
        (b"GIF89a", "damaged|no image"),
        (png_head(10, 50_000), "50000 x 10, more than 32767 pixels"),
        (png_head(20_000, 20_000), "larger than Pillow decodes"),
        (png_head(0, 0), "no pixels|damaged|no image"),
        (png_head(10_000, 32), "processor refuses it"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused_with_record_and_file(
    tmp_path: Path, data: bytes, message: str
):
    (tmp_path / "bad.png").write_bytes(data)
    record = seen(tmp_path, messages=ask({"type": "image", "image": "bad.png"}))
    with pytest.raises(DataError, match=message) as caught:
        encode(media_processor(), record)
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl:3: bad.png: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": ask({"type": "image", "image": "gone.png"})}, r"gone\.png: cannot be read"),
        ({"messages": ask({"type": "image", "image": 3})}, "its image is a int"),
        ({"messages": ask({"type": "image", "image": {"size": 3}})}, "a dict without a place"),
        (
            {"messages": ask({"type": "image", "image": "http://127.0.0.1:9/a.png"})},
            r"127\.0\.0\.1:9/a\.png: cannot be fetched",
        ),
        (
            {
                "images": ["a.png"],
                "messages": [{"role": "user", "content": "<image><image>"}, ANSWER],
            },
            "2 places for images from a column, the record 1",
        ),
        (
            {"images": ["a.png"] * 2, "messages": say("<image>")},
            "1 places for images from a column, the record 2",
        ),
        (
            {
                "messages": ask(
                    {"type": "text", "text": "<|image_pad|>"}, {"type": "image", "image": "a.png"}
                )
            },
            "2 places for 1 images",
        ),
        ({"messages": ask(PLACE)}, "1 places for media"),
        (
            {"messages": ask({"type": "audio", "audio": "a.wav"})},
            "audios, which the model does not",
        ),
        (
            {"images": ["a.png"], "messages": [{"role": "user", "content": "\ufdd0"}, ANSWER]},
            "none of text",
        ),
    ],
)
def test_a_record_whose_media_do_not_fit_its_text_is_refused(tmp_path: Path, fields, message):
    write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=message) as caught:
        encode(media_processor(), seen(tmp_path, **fields))
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl:3: ")


def test_a_model_of_text_refuses_images(tmp_path: Path):
    tokenizer = build_processor().tokenizer
    transform = build_transform(TransformSettings(), tokenizer)
    record = seen(tmp_path, messages=ask(IMAGE))
    with pytest.raises(DataError, match=r"images, which data\.chat_template: tokenizer cannot"):
        transform.encode([record])


def test_a_file_that_changed_since_it_was_prepared_is_told(tmp_path: Path):
    media = media_processor()
    write_image(tmp_path / "a.png")
    (sample,) = encode(media, seen(tmp_path, messages=ask(IMAGE)))
    write_image(tmp_path / "a.png", 32, 32)
    with pytest.raises(DataError, match=r"a\.png: it has changed since the data was prepared"):
        collate([sample], CollateSettings(media=media))


def test_a_processor_crosses_to_another_process_without_what_it_remembers(tmp_path: Path):
    media = media_processor()
    text = media.write_image((64, 96))
    again = pickle.loads(pickle.dumps(media))
    assert again.write_image((64, 96)) == text
    build_processor().save_pretrained(tmp_path)
    found = find_processor(str(tmp_path))
    assert type(found).__name__ == "Qwen3VLProcessor"
    (tmp_path / "empty").mkdir()
    assert find_processor(str(tmp_path / "empty")) is None


def test_resizing_keeps_within_the_bounds_and_counts_agree(tmp_path: Path):
    media = media_processor(image_min_pixels=2048, image_max_pixels=4096, scale_factor=32)
    rng = np.random.default_rng(0)
    for seed, (height, width) in enumerate(rng.integers(10, 300, (8, 2)).tolist()):
        write_image(tmp_path / "a.png", height, width, seed)
        (sample,) = encode(media, seen(tmp_path, messages=ask(IMAGE)))
        plan = json.loads(sample.media[0].plan)
        assert plan["size"][0] % 32 == plan["size"][1] % 32 == 0
        batch = collate([sample], CollateSettings(media=media))
        (_, rows, columns) = batch.media["image_grid_thw"][0].tolist()
        assert [rows * 16, columns * 16] == plan["size"]


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL", "Qwen3OmniMoe"])
@pytest.mark.parametrize("size", [(64, 64), (20, 20), (13, 400), (333, 151)])
def test_a_bound_above_holds_where_the_processor_enlarges_what_is_small(
    tmp_path: Path, family: Family, size: tuple[int, int]
):
    processor: Any = build_processor(family)
    low, most = 512**2, 128**2
    processor.image_processor.size = {"shortest_edge": low, "longest_edge": 1024**2}
    patch = processor.image_processor.patch_size
    write_image(tmp_path / "a.png", *size)

    def sides(**bounds: Any) -> tuple[int, int]:
        media = MediaProcessor(processor, MediaConfig(**bounds))
        (sample,) = encode(media, seen(tmp_path, messages=ask(IMAGE)), max_seq_len=4000)
        grid = collate([sample], CollateSettings(media=media)).media["image_grid_thw"][0]
        return int(grid[1]) * patch, int(grid[2]) * patch

    free = sides()
    assert free[0] * free[1] >= low
    assert sides(image_max_pixels=2 * low) == free  # it binds neither image nor processor
    height, width = sides(image_max_pixels=most)
    assert 0.5 * most < height * width <= most  # as large as may be, of much the same shape ...
    assert height == 2 * patch or height / width == pytest.approx(size[0] / size[1], rel=0.4)
    height, width = sides(image_max_pixels=most, image_min_pixels=1)
    if size[0] * size[1] < most:  # ... and here no larger than it is
        assert (height, width) == tuple(max(1, round(one / patch / 2)) * patch * 2 for one in size)
