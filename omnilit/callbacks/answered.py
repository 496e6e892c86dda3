"""Held-out prompts with what a model said to them, for a file, for loggers and for people."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from PIL import Image
from transformers import PreTrainedTokenizerBase

from omnilit.callbacks.cards import draw_card
from omnilit.callbacks.showing import Exhibit
from omnilit.data.media.pictures import Picture, draw_media, encode_picture
from omnilit.data.media.places import show_places
from omnilit.data.prompts import HeldOutPrompt, PromptSet

TAG: Final = "samples"
COLUMNS: Final[tuple[str, ...]] = ("prompt", "expected", "completion")
MAX_CARDS: Final = 16  # of an evaluation


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answers.

    Args:
        texts: The `COLUMNS` with special tokens in prompt and expected answer; of the places of a
            medium the first.
        words: The same without special tokens and space around them.
        pictures: Of the media of the prompt.
    """

    texts: Mapping[str, str]
    words: Mapping[str, str]
    pictures: tuple[Picture, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the expected answer was given, and nothing else."""
        return self.words["expected"] == self.words["completion"]


def draw_prompts(prompts: PromptSet) -> list[tuple[Picture, ...]]:
    """The pictures of each prompt."""
    samples = [one.prompt for one in prompts.prompts]
    return [draw_media(sample.media, sample.origin) for sample in samples]


def join_answers(
    prompts: PromptSet,
    completions: Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Answered]:
    """Every prompt with its answers in words, without pictures.

    Args:
        prompts: What was asked.
        completions: Tokens that a model went on with.
        tokenizer: Of the model.
    """
    found: list[Answered] = []
    for one, completion in zip(prompts.prompts, completions, strict=True):
        ids = (_shown_ids(one, prompts), list(one.expected), list(completion))
        texts = [str(tokenizer.decode(tokens)) for tokens in ids]
        words = [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in ids]
        found.append(Answered(_by_column(texts), _by_column(words)))
    return found


def save_pictures(folder: Path, pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """Write pictures, each once, under names that say their contents.

    Returns:
        Of each its caption, and where it has an image the name of its file.
    """
    found: list[dict[str, str]] = []
    for picture in pictures:
        entry = {"caption": picture.caption}
        if picture.image is not None:
            data, ending = encode_picture(picture.image)
            entry["file"] = f"{hashlib.blake2b(data, digest_size=8).hexdigest()}.{ending}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / entry["file"]).exists():
                (folder / entry["file"]).write_bytes(data)
        found.append(entry)
    return found


def exhibit_answers(answers: Sequence[Answered]) -> Exhibit:
    """Samples as loggers show them; the first of those with pictures also as cards."""
    cards = dict(islice(_draw_cards(answers), MAX_CARDS))
    columns, rows = list(COLUMNS), [list(one.texts.values()) for one in answers]
    if cards:
        columns = ["card", *columns]
        rows = [[cards.get(number), *row] for number, row in enumerate(rows, start=1)]
    return Exhibit(
        TAG,
        columns,
        rows,
        {f"{TAG}/{n}": _as_markdown(one.texts) for n, one in enumerate(answers, start=1)},
        {f"{TAG}/{number}": card for number, card in cards.items()},
    )


def _by_column(texts: Sequence[str]) -> dict[str, str]:
    return dict(zip(COLUMNS, texts, strict=True))


def _draw_cards(answers: Sequence[Answered]) -> Iterator[tuple[int, Image.Image]]:
    for number, one in enumerate(answers, start=1):
        images = [picture.image for picture in one.pictures if picture.image is not None]
        if images:
            yield number, draw_card(images, one.words, is_right=one.is_exact)


def _shown_ids(one: HeldOutPrompt, prompts: PromptSet) -> list[int]:
    media = prompts.settings.media
    shown = one.prompt if media is None else show_places(one.prompt, media)
    return shown.input_ids.tolist()


def _as_markdown(texts: Mapping[str, str]) -> str:
    return "\n\n".join(f"**{name}**\n\n{_verbatim(text)}" for name, text in texts.items())


def _verbatim(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return textwrap.indent(text, "    ", lambda _: True)
