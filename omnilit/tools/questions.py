"""What a model reads of a conversation that it is to answer: tokens, and tensors of its media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from omnilit.config.media import INFER_KEY, read_media_config
from omnilit.data.encode import Tokens
from omnilit.data.media.load import load_media, token_types
from omnilit.data.media.places import expand, find_blocks
from omnilit.data.media.plans import has_track
from omnilit.data.media.processor import (
    MediaProcessor,
    check_hearing,
    find_processor,
    hearing_rate,
)
from omnilit.data.messages import Conversation, keep_images
from omnilit.data.refusals import refuse
from omnilit.data.templates import ChatTemplate, Rendered, select_template
from omnilit.errors import ConfigError
from omnilit.models.media.rope_positions import TRACK
from omnilit.types import IGNORE, Medium, Record, Sample

KEY: Final = "infer.tokenizer_path"


@dataclass(frozen=True)
class QuestionReader:
    """Writes conversations as training does, up to the header of the next answer.

    Args:
        tokenizer: Of the model.
        template: Writes them.
        media: Of a model that takes images, videos or sounds; None for one of text.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    media: MediaProcessor | None = None

    def read(self, conversation: Conversation, record: Record) -> Sample:
        """The tokens of a conversation, with its media planned and not decoded yet.

        Args:
            conversation: Ends with a question.
            record: It came from.

        Raises:
            DataError: The template cannot write it, or a medium cannot be used.
        """
        if self.media is not None and (limit := self.media.config.max_image_nums) is not None:
            conversation = keep_images(conversation, limit)
        if conversation.media and self.media is None:
            kind = conversation.media[0].kind
            problem = f"the record has {kind}s, and the model takes text alone"
            raise refuse(record, problem, "leave them out, or name a model that takes them")
        text = self.template.write(conversation, record, is_prompt=True)
        media: tuple[Medium, ...] = ()
        if self.media is not None and conversation.media:
            written = expand(Rendered(text, [], []), conversation.media, record, self.media)
            text, media = written.rendered.text, written.media
        encoded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = np.asarray(cast("list[int]", encoded), np.int32)
        if self.media is not None:  # text that spells a place would take that of a medium
            find_blocks(Tokens(ids, np.zeros(len(ids), np.bool_)), media, record, self.media)
        return Sample(ids, np.full_like(ids, IGNORE), record.origin, media=media)

    def load(self, question: Sample, device: torch.device) -> dict[str, Any]:
        """What the model takes beside the tokens of a question, under the names of its `forward`.

        Raises:
            DataError: A medium cannot be decoded.
        """
        if self.media is None:
            return {}
        ids = question.input_ids.astype(np.int64)
        types = token_types(ids, self.media, has_media=bool(question.media))
        tensors = {**load_media([question], self.media), **types}
        found: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        if any(has_track(medium) for medium in question.media):
            found[TRACK] = True  # positions of a sound are within those of its video
        return found


def open_reader(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    takes_media: bool,
    settings: Mapping[str, Any] | None = None,
) -> QuestionReader:
    """How questions are written for a model.

    Args:
        path: Folder of the tokenizer, or a name on the hub.
        tokenizer: Read from there.
        takes_media: Whether the model has towers, so that a processor is looked for.
        settings: `infer.mm_configs`.

    Raises:
        ConfigError: The processor cannot be loaded, there is no chat template, or the settings do
            not fit.
    """
    processor = find_processor(path, key=KEY) if takes_media else None
    if not tokenizer.chat_template and not getattr(processor, "chat_template", None):
        raise ConfigError(
            key=KEY,
            problem=f"the tokenizer in {path} has no chat template",
            fix="use a tokenizer that has one, such as that of the run's export",
        )
    template = select_template("tokenizer", tokenizer, processor)
    if processor is None and settings:
        problem = f"the model in {path} has no processor that they are for"
        raise ConfigError(key=INFER_KEY, problem=problem, fix="leave them out")
    if processor is None:
        return QuestionReader(tokenizer, template)
    rate = hearing_rate(processor)
    heard = {} if rate is None else {"sample_rate": rate}
    media = MediaProcessor(processor, read_media_config({**heard, **(settings or {})}, INFER_KEY))
    check_hearing(media, INFER_KEY)
    return QuestionReader(tokenizer, template, media)
