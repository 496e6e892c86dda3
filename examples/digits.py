"""Draw scikit-learn's handwritten digits as images with a question each, and a model to be trained.

Written to `--out`: `images/`, `train.jsonl` and `eval.jsonl`, whose images are in no row of the
training, and `model/`: the configuration of a tiny model of the architecture of Qwen3-VL without
weights, with its tokenizer and processor. With `--omni` also films of two digits in turn and tones
to be named, in files of their own, and `omni/`: a model like Qwen2.5-Omni's thinker, which hears.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE: Final = 32  # pixels
PATCH: Final = 8
HELD_OUT: Final = 6  # every so many-th image
QUESTIONS: Final = ("Which digit is this?", "What number do you see?")
FILM_QUESTION: Final = "Which digits are shown, in order?"
NOTE_QUESTION: Final = "Which note is this?"
FILMS: Final = 1_800
FILM_DIGITS: Final = 2
FRAMES_PER_DIGIT: Final = 4
FPS: Final = 4
TONES: Final = 720
RATE: Final = 16_000
SOUND_S: Final = 0.5
NOTES: Final = {"C": 261.63, "D": 293.66, "E": 329.63, "F": 349.23, "G": 392.0, "A": 440.0}
SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
)
TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What both models have alike: sizes of images, and parts
SIZE: Final = {"shortest_edge": SIDE * SIDE, "longest_edge": 64 * SIDE * SIDE}
KINDS: Final = ("image", "video", "audio")
EDGES: Final = ("vision_start", "vision_end", "audio_start", "audio_end")
MEL_BINS: Final = 80
ROPE: Final = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]}
TEXT: Final = {
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
}
VISION: Final = {
    "depth": 2,
    "hidden_size": 64,
    "out_hidden_size": 96,
    "intermediate_size": 128,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
AUDIO: Final = {
    "num_mel_bins": MEL_BINS,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "d_model": 64,
    "n_window": 25,
    "output_dim": 96,
    "max_source_positions": 200,
    "initializer_range": 0.1,  # with 0.02 positions are all that is heard at first
}

Row = dict[str, Any]


def load_images() -> tuple[list[Image.Image], list[int]]:
    """The digits, dark on white, and what each of them is."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    ink = 255 - (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    size = (SIDE, SIDE)
    drawn = [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in ink]
    return drawn, labels.tolist()


def is_held_out(index: int) -> bool:
    """Whether an image is kept from training."""
    return index % HELD_OUT == 0


def write_images(out: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> dict[str, int]:
    """Images and their questions; returns how many rows each file has."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {"train": [], "eval": []}
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"images/{index:04}.png"
        image.save(out / name)
        question = QUESTIONS[index // HELD_OUT % len(QUESTIONS)]
        part = {"type": "image", "image": name}
        rows["eval" if is_held_out(index) else "train"].append(ask(part, question, str(label)))
    return {name: write_rows(out / f"{name}.jsonl", found) for name, found in rows.items()}


def write_videos(
    out: Path, images: Sequence[Image.Image], labels: Sequence[int], number: int
) -> dict[str, int]:
    """Films of a few digits in turn, without loss, and their questions."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {"video_train": [], "video_eval": []}
    rng = np.random.default_rng(0)
    for film in range(number):
        split = "eval" if is_held_out(film) else "train"
        pool = [i for i in range(len(images)) if is_held_out(i) == (split == "eval")]
        chosen = rng.choice(pool, FILM_DIGITS, replace=False).tolist()
        name = f"videos/{film:04}.mkv"
        frames = [images[i] for i in chosen for _ in range(FRAMES_PER_DIGIT)]
        write_film(out / name, frames)
        said = " ".join(str(labels[i]) for i in chosen)
        part = {"type": "video", "video": name}
        rows[f"video_{split}"].append(ask(part, FILM_QUESTION, said))
    return {name: write_rows(out / f"{name}.jsonl", found) for name, found in rows.items()}


def write_film(file: Path, frames: Iterable[Image.Image]) -> None:
    """Frames in a file, `FPS` a second, every pixel as it is."""
    import av

    with av.open(str(file), "w") as film:
        stream = film.add_stream("ffv1", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "bgr0"
        for image in frames:
            film.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
        film.mux(stream.encode())


def write_sounds(out: Path, number: int) -> dict[str, int]:
    """Tones of other loudness and phase, and their questions."""
    import soundfile

    (out / "sounds").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {"audio_train": [], "audio_eval": []}
    rng = np.random.default_rng(0)
    names = list(NOTES)
    for index in range(number):
        note = names[index % len(names)]
        name = f"sounds/{index:04}.wav"
        soundfile.write(out / name, make_tone(NOTES[note], rng), RATE)
        split = "eval" if is_held_out(index // len(names)) else "train"
        part = {"type": "audio", "audio": name}
        rows[f"audio_{split}"].append(ask(part, NOTE_QUESTION, note))
    return {name: write_rows(out / f"{name}.jsonl", found) for name, found in rows.items()}


def make_tone(frequency: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Samples of a sine with some noise, [RATE * SOUND_S]."""
    times = np.arange(int(RATE * SOUND_S)) / RATE
    wave = np.sin(2 * np.pi * (frequency * times + rng.random())) * rng.uniform(0.2, 0.8)
    return (wave + rng.normal(0, 0.01, len(times))).astype(np.float32)


def ask(part: Mapping[str, str], question: str, answer: str) -> Row:
    """A conversation about one medium."""
    content = [dict(part), {"type": "text", "text": question}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [{"role": "user", "content": content}, said]}


def write_rows(file: Path, rows: Sequence[Row]) -> int:
    """Rows as JSON lines; how many."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def texts() -> Iterator[str]:
    """All that is ever said."""
    yield from (*QUESTIONS, FILM_QUESTION, NOTE_QUESTION, *NOTES)
    yield from ("user\n", "assistant\n", "system\n")
    yield from (f"<{tenths / 10:.1f} seconds>" for tenths in range(100))


def build_tokenizer() -> Any:
    """Words of these texts as tokens, with bytes for all others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(list(texts()) * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "audio_token": "<|audio_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
    )


def write_model(folder: Path) -> None:
    """Configuration, tokenizer and processor of a tiny model; its weights are to be random."""
    import transformers as hf

    tokenizer = build_tokenizer()
    videos = hf.Qwen3VLVideoProcessor(patch_size=PATCH, size=SIZE, cap_pixels_per_frame=False)
    images = hf.Qwen2VLImageProcessor(patch_size=PATCH, size=SIZE)
    processor = hf.Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
    ids = token_ids(tokenizer)
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    save_model(folder, processor, config, "Qwen3VLForConditionalGeneration")


def write_omni_model(folder: Path) -> None:
    """The same of a model that hears, too."""
    import transformers as hf

    tokenizer = build_tokenizer()
    videos = hf.Qwen2VLVideoProcessor(patch_size=PATCH, size=SIZE)
    images = hf.Qwen2VLImageProcessor(patch_size=PATCH, size=SIZE)
    ears = hf.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=4, padding_side="right")
    processor = hf.Qwen2_5OmniProcessor(images, videos, ears, tokenizer, chat_template=TEMPLATE)
    ids = token_ids(tokenizer)
    tokens: dict[str, Any] = {f"{kind}_token_index": ids[f"{kind}_pad"] for kind in KINDS}
    tokens |= {f"{name}_token_id": ids[name] for name in EDGES}
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**VISION, "window_size": SIDE, "fullatt_block_indexes": [1]},
        audio_config=AUDIO,
        tie_word_embeddings=True,
        **tokens,
    )
    save_model(folder, processor, config, "Qwen2_5OmniThinkerForConditionalGeneration")


def save_model(folder: Path, processor: Any, config: Any, class_name: str) -> None:
    """The files of a model without weights."""
    processor.save_pretrained(folder)
    config.architectures = [class_name]
    config.save_pretrained(folder)


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens, by what stands between their bars."""
    return {name[2:-2]: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}


def write_all(out: Path, *, films: int = 0, tones: int = 0) -> dict[str, int]:
    """Data and models, the one that hears where there are films or tones; rows of each file."""
    images, labels = load_images()
    numbers = write_images(out, images, labels)
    write_model(out / "model")
    if films or tones:
        numbers |= write_videos(out, images, labels, films) | write_sounds(out, tones)
        write_omni_model(out / "omni")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--omni", action="store_true", help="films, tones and a model for them")
    arguments = parser.parse_args(argv)
    import omnilit  # noqa: F401 - makes torchvision importable, see there

    more = {"films": FILMS, "tones": TONES} if arguments.omni else {}
    numbers = write_all(arguments.out, **more)
    models = "model, omni" if arguments.omni else "model"
    print(f"{arguments.out}: {', '.join(f'{n} {name}' for name, n in numbers.items())}, {models}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
