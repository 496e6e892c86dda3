"""From records to samples: which tokens, which of them are trained, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from omnilit.data.encode import (
    Encoder,
    Tokens,
    check_mask,
    encode_rendered,
    encode_texts,
    to_sample,
)
from omnilit.data.messages import check_text, get_field, read_turns, refuse
from omnilit.data.templates import ChatTemplate, check_end_token, select_template
from omnilit.errors import ConfigError, suggest
from omnilit.types import Record, Sample

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase

Overlong: TypeAlias = Literal["truncate", "drop", "error"]
Side: TypeAlias = Literal["left", "right"]

# What `data.text_keys: null` means for each type of data.
TEXT_KEYS: Final = {"conversation": "messages", "plaintext": "content_split"}


@dataclass(frozen=True, slots=True)
class TransformSettings:
    """How records become samples.

    Args:
        data_type: `conversation` or `plaintext`.
        text_key: The field with the messages or the text; None is the type's own name.
        chat_template: `default`, `plain` or `tokenizer`; conversations only.
        max_seq_len: Tokens that a sample may have.
        overlong: What becomes of a longer conversation.
        truncation_side: The side that `overlong: truncate` cuts off.
    """

    data_type: str = "conversation"
    text_key: str | None = None
    chat_template: str = "default"
    max_seq_len: int = 2048
    overlong: Overlong = "truncate"
    truncation_side: Side = "right"


class Outcome(NamedTuple):
    """What became of a batch of records.

    Args:
        samples: Of each record, in order; a dropped record has none.
        num_truncated: Records that lost tokens.
        num_dropped: Records left out for their length.
    """

    samples: list[list[Sample]]
    num_truncated: int = 0
    num_dropped: int = 0


class Transform(Protocol):
    """Turns records into samples, many at a time since tokenizers are faster so."""

    def encode(self, records: Sequence[Record]) -> Outcome:
        """The samples of each record; raises a DataError that names a bad one."""
        ...

    def check(self, record: Record) -> None:
        """See that what is trained of `record` is what should be; run on the first record."""
        ...


@dataclass(frozen=True, slots=True)
class ConversationTransform:
    """Conversations through a chat template; one sample a record.

    Args:
        encoder: Tokenises.
        template: Says which text is trained.
        settings: Field, length and what to do beyond it.
    """

    encoder: Encoder
    template: ChatTemplate
    settings: TransformSettings
    text_key: str = field(default=TEXT_KEYS["conversation"])

    def __call__(self, record: Record) -> list[Sample]:
        """The samples of one record."""
        return self.encode([record]).samples[0]

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Tokenise a batch; see `Transform`."""
        samples: list[list[Sample]] = []
        num_truncated = num_dropped = 0
        for tokens, record in zip(self._tokenize(records), records, strict=True):
            fitted = fit_length(tokens, record, self.settings)
            num_dropped += fitted is None
            num_truncated += fitted is not None and len(fitted.ids) < len(tokens.ids)
            samples.append([] if fitted is None else [to_sample(fitted, record)])
        return Outcome(samples, num_truncated, num_dropped)

    def check(self, record: Record) -> None:
        """Decode what is trained and compare it with what was said; see `check_mask`."""
        turns = read_turns(record, self.text_key)
        self.template.check_header(turns, record)
        rendered = self.template.render(turns, record)
        (tokens,) = encode_rendered(self.encoder, [rendered], [record])
        check_mask(tokens, rendered, record, self.encoder)

    def _tokenize(self, records: Sequence[Record]) -> list[Tokens]:
        rendered = [self.template.render(read_turns(r, self.text_key), r) for r in records]
        return encode_rendered(self.encoder, rendered, records)


@dataclass(frozen=True, slots=True)
class PlaintextTransform:
    """Texts, each ended by the end-of-text token, cut in chunks without losing a token.

    Every token but a chunk's first is a target. A last chunk of one token has none; it is kept.

    Args:
        encoder: Tokenises.
        settings: Field and length of the chunks.
        end_id: The end-of-text token.
    """

    encoder: Encoder
    settings: TransformSettings
    end_id: int
    text_key: str = field(default=TEXT_KEYS["plaintext"])

    def __call__(self, record: Record) -> list[Sample]:
        """The samples of one record."""
        return self.encode([record]).samples[0]

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Tokenise a batch; see `Transform`."""
        key, size = self.text_key, self.settings.max_seq_len
        texts = [check_text(r, get_field(r, key), f"the field {key!r}") for r in records]
        samples: list[list[Sample]] = []
        for (ids, _), record in zip(encode_texts(self.encoder, texts), records, strict=True):
            ended = np.append(ids, np.int32(self.end_id))
            chunks = [ended[start : start + size] for start in range(0, len(ended), size)]
            samples.append([Sample(chunk, chunk, record.origin) for chunk in chunks])
        return Outcome(samples)

    def check(self, record: Record) -> None:
        """Nothing to see: everything is trained."""


def build_transform(
    settings: TransformSettings, tokenizer: PreTrainedTokenizerBase
) -> ConversationTransform | PlaintextTransform:
    """The transform of a type of data.

    Raises:
        ConfigError: An unknown type of data, a template or a tokenizer that cannot be used.
    """
    if settings.data_type not in TEXT_KEYS:
        raise ConfigError(
            key="data.data_type",
            problem=f"{settings.data_type!r} cannot be tokenised."
            f"{suggest(settings.data_type, TEXT_KEYS)}",
            fix=f"use one of {', '.join(TEXT_KEYS)}",
        )
    encoder = Encoder.of(tokenizer)
    key = settings.text_key or TEXT_KEYS[settings.data_type]
    if settings.data_type == "plaintext":
        return PlaintextTransform(encoder, settings, check_end_token(tokenizer), key)
    template = select_template(settings.chat_template, tokenizer)
    return ConversationTransform(encoder, template, settings, key)


def fit_length(tokens: Tokens, record: Record, settings: TransformSettings) -> Tokens | None:
    """The tokens cut to `max_seq_len`, or None for a record that is to be left out.

    Raises:
        DataError: The record is longer and `overlong` is `error`.
    """
    size, limit = len(tokens.ids), settings.max_seq_len
    if size <= limit:
        return tokens
    if settings.overlong == "error":
        raise refuse(
            record,
            f"the record has {size} tokens, data.max_seq_len is {limit}",
            "raise data.max_seq_len, or set data.overlong to truncate or drop",
        )
    if settings.overlong == "drop":
        return None
    kept = slice(limit) if settings.truncation_side == "right" else slice(size - limit, size)
    return tokens._replace(ids=tokens.ids[kept], is_label=tokens.is_label[kept])


def resolve_settings(
    settings: TransformSettings, template: ChatTemplate | None
) -> TransformSettings:
    """The settings with every default replaced by what it stands for, for a cache's key."""
    return replace(
        settings,
        text_key=settings.text_key or TEXT_KEYS[settings.data_type],
        chat_template=template.name if template else "",
    )
