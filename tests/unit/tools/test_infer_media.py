"""Questions about images and videos: on the command line and in a file."""

import io
import json
import re
from typing import Any, cast

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)
from transformers.video_utils import VideoMetadata

from omnilit.config import InferArguments
from omnilit.data.records import to_question
from omnilit.errors import ConfigError, DataError
from omnilit.tools.chat import open_chat
from omnilit.tools.file_request import FileRequest
from omnilit.tools.infer import parse_request, run
from omnilit.tools.infer_file import answer_file
from omnilit.types import Origin, Record
from tests.helpers.films import tone, write_film
from tests.helpers.media_runs import write_seeing_model
from tests.helpers.processors import write_image

FRAMES = np.random.default_rng(0).integers(0, 256, (8, 32, 64, 3), dtype=np.uint8)
GREEDY = ("--infer.do_sample", "false", "--infer.max_tokens", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-VL, two images of unequal size, and a video of eight frames."""
    folder = write_seeing_model(tmp_path_factory.mktemp("seeing"), has_weights=True)
    write_image(folder / "a.png", 64, 96, seed=1)
    write_image(folder / "b.png", 96, 64, seed=2)
    with av.open(str(folder / "v.mkv"), "w") as film:
        stream = film.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "bgr0"
        for pixels in FRAMES:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    return make_chat(folder)


def make_chat(folder, **fields):
    fields = {"do_sample": False, "max_tokens": 5, **fields}
    arguments = InferArguments(model_path=str(folder), **fields)
    return open_chat(arguments, str(folder), "cpu", io.StringIO())


def generate_plain(folder, messages, **given):
    """Greedy text and the log-probabilities of its tokens, by transformers alone.

    Media stand in the messages, or are given as arrays beside them.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if given:
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], return_tensors="pt", **given)
    else:
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=5,
            pad_token_id=0,
            eos_token_id=processor.tokenizer.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True), logprobs.tolist()


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def image(folder, name):
    return {"type": "image", "image": Image.open(folder / name)}


def test_an_image_of_the_command_line_gives_the_text_of_transformers_own_generation(folder, capsys):
    files = ["--image", str(folder / "a.png"), f"--image={folder / 'b.png'}"]
    argv = ["--infer.model_path", str(folder), *GREEDY, *files]
    texts = []
    for prompt, parts in (
        ("Which?", (image(folder, "a.png"), image(folder, "b.png"), "Which?")),
        ("A <image> B <image>", ("A ", image(folder, "a.png"), " B ", image(folder, "b.png"))),
    ):
        assert run([*argv, "--prompt", prompt]) == 0
        texts.append(capsys.readouterr().out.removesuffix("\n"))
        assert texts[-1] == generate_plain(folder, user(*parts))[0]
    assert texts[0] != texts[1]


def test_images_are_prepared_as_mm_configs_say(folder, capsys):
    argv = ["--infer.model_path", str(folder), *GREEDY, "--image", str(folder / "a.png")]
    bounds = "{image_max_pixels: 2048}"
    assert run([*argv, "--prompt", "Which?", "--infer.mm_configs", bounds]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    small = image(folder, "a.png")["image"].resize((55, 36))
    assert text == generate_plain(folder, user({"type": "image", "image": small}, "Which?"))[0]
    assert text != generate_plain(folder, user(image(folder, "a.png"), "Which?"))[0]


def test_images_beyond_the_most_lose_their_places(folder, capsys):
    argv = ["--infer.model_path", str(folder), *GREEDY, "--image", str(folder / "a.png")]
    more = ["--image", str(folder / "b.png"), "--infer.mm_configs", "{max_image_nums: 1}"]
    texts = []
    for files in ([], more):
        assert run([*argv, *files, "--prompt", "Which?"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_the_sound_of_a_video_has_its_places_within_those_of_the_video(tmp_path):
    write_seeing_model(tmp_path, "qwen2_5_omni_thinker", has_weights=True)
    film = str(tmp_path / write_film(tmp_path / "film.mkv", 8, tone(2.0)))
    settings = {"use_audio_in_video": True, "video_max_pixels": 56**2}
    chat = make_chat(tmp_path, mm_configs=settings)
    record = {"prompt": "Which?", "video": film}
    (tmp_path / "asked.jsonl").write_text(json.dumps(record))
    request = FileRequest(str(tmp_path / "asked.jsonl"), tmp_path / "out.jsonl", has_logprobs=True)
    assert answer_file(request, chat) == 1
    (line,) = read(request.output)

    origin = Record(record, Origin("prompt", str(tmp_path / "asked.jsonl"), 1))
    question = chat.reader.read(to_question(origin), origin)
    given = chat.reader.load(question, torch.device("cpu"))
    ids = torch.from_numpy(question.input_ids).long()[None]
    found = []
    for is_within in (True, False):
        given["use_audio_in_video"] = is_within
        out = cast("Any", chat.model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **given,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=5, pad_token_id=0),
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(out.logits)[:, 0].log_softmax(-1)
        found.append(logits.max(-1).values[: len(line["logprobs"])].tolist())
    assert line["logprobs"] == pytest.approx(found[0], abs=1e-5)
    assert line["logprobs"] != pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{fpz: 2}", r"infer\.mm_configs\.fpz: there is no such setting"),
        ("{use_audio_in_video: true}", r"infer\.mm_configs\.use_audio_in_video: .* takes no sound"),
    ],
)
def test_wrong_settings_of_media_are_refused(folder, values, message):
    argv = ["--infer.model_path", str(folder), *GREEDY, "--image", str(folder / "a.png")]
    with pytest.raises(ConfigError, match=message):
        run([*argv, "--prompt", "Which?", "--infer.mm_configs", values])


def test_a_file_with_media_is_answered_as_by_transformers_whatever_ran_before(
    folder, chat, tmp_path
):
    typed = user({"type": "image", "image": str(folder / "b.png")}, "What?")
    records = [
        {"prompt": "What?", "images": [str(folder / "a.png")]},
        {"prompt": "What?"},  # positions of the image before are forgotten
        {"messages": typed},
        {"prompt": "<image>What?", "image": str(folder / "a.png")},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    request = FileRequest(str(tmp_path / "asked.jsonl"), tmp_path / "out.jsonl", has_logprobs=True)
    assert answer_file(request, chat) == 4
    lines = read(request.output)
    first = user(image(folder, "a.png"), "What?")
    plain = [first, user("What?"), user(image(folder, "b.png"), "What?"), first]
    for record, line, messages in zip(records, lines, plain, strict=True):
        text, logprobs = generate_plain(folder, messages)
        assert line == {**record, "completion": text, "logprobs": pytest.approx(logprobs, abs=1e-4)}
    assert answer_file(request, chat) == 0


def test_frames_of_a_video_are_those_of_its_times(folder, chat):
    answer = chat.ask("Which?", {"videos": [str(folder / "v.mkv")]})
    chat.messages.clear()
    taken = [0, 2, 5, 7]  # two a second, evenly over 8 frames at 4 a second
    plain, _ = generate_plain(
        folder,
        user({"type": "video"}, "Which?"),
        videos=[FRAMES[taken].transpose(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(8, fps=4.0, height=32, width=64, frames_indices=taken)],
        do_sample_frames=False,
    )
    assert answer == plain


def test_the_same_seed_draws_the_same_answers_about_images(folder, tmp_path):
    record = json.dumps({"prompt": "What?", "images": [str(folder / "a.png")]})
    (tmp_path / "asked.jsonl").write_text(f"{record}\n{record}\n")
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        request = FileRequest(str(tmp_path / "asked.jsonl"), tmp_path / f"{name}.jsonl")
        answer_file(request, make_chat(folder, do_sample=True, seed=seed, max_tokens=9))
        texts.append(
            [json.loads(line)["completion"] for line in request.output.read_text().splitlines()]
        )
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]  # each record has random numbers of its own


def test_bytes_of_a_table_stand_in_the_output_as_base64_that_is_read_again(folder, chat, tmp_path):
    data = (folder / "a.png").read_bytes()
    table = pa.table({"prompt": ["What?"], "image": [{"bytes": data}]})
    pq.write_table(table, tmp_path / "in.parquet")
    first = FileRequest(str(tmp_path / "in.parquet"), tmp_path / "out.jsonl")
    again = FileRequest(str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl")
    assert (answer_file(first, chat), answer_file(again, chat)) == (1, 1)
    assert first.output.read_text() == again.output.read_text()
    assert (
        generate_plain(folder, user(image(folder, "a.png"), "What?"))[0]
        in (json.loads(again.output.read_text())["completion"])
    )


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        (
            "<image>",
            ["a.png", "b.png"],
            r"has 1 places for images .* To fix: write <image> once",
        ),
        ("<image><image>", ["a.png"], r"has 2 places for images"),
        ("Which?", ["gone.png"], r"gone\.png: cannot be read \(No such file"),
        ("Which?", ["config.json"], r"config\.json: it is no image that Pillow knows"),
        ("<|image_pad|>", [], r"the tokens have 1 places for media, the media need 0"),
    ],
)
def test_files_that_do_not_fit_the_prompt_or_are_no_images_are_refused(
    folder, chat, text, files, message
):
    with pytest.raises(DataError, match=message) as caught:
        chat.ask(text, {"images": [str(folder / name) for name in files]} if files else None)
    assert not str(caught.value).startswith(":")
    assert chat.messages == []


def test_a_model_of_text_and_one_without_ears_say_what_they_take(folder, model_folder, tmp_path):
    argv = ["--prompt", "x", "--infer.model_path"]
    with pytest.raises(ConfigError, match=f"--image: {model_folder} reads text alone"):
        run([*argv, str(model_folder), "--image", "x.png"])
    with pytest.raises(ConfigError, match=r"--audio: .* takes images and videos alone"):
        run([*argv, str(folder), "--audio", "x.wav"])
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "images": ["a.png"]}\n')
    request = FileRequest(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    message = re.escape("in.jsonl:1: the record has images, and the model takes text alone")
    with pytest.raises(DataError, match=message):
        answer_file(request, make_chat(model_folder))


def test_files_act_with_a_prompt():
    with pytest.raises(ConfigError, match=r"--image: acts with --prompt\. To fix: ask"):
        parse_request(["--infer.model_path", ".", "--image", "a.png"])
