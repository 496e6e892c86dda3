"""From records to samples: which tokens, which of them are trained, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from omnilit.data.encode import (
    Encoder,
    Tokens,
    check_mask,
    encode_ids,
    encode_rendered,
    find_tokens,
    to_sample,
)
from omnilit.data.labels import count_targets
from omnilit.data.media.places import Expanded, expand, find_blocks
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.messages import Conversation, keep_images, refuse
from omnilit.data.outcomes import Outcome, join_outcomes
from omnilit.data.own_transform import KEY, check_samples
from omnilit.data.quarantine import BadRecord
from omnilit.data.records import (
    check_diffusion,
    to_conversation,
    to_labelled,
    to_pair,
    to_text,
)
from omnilit.data.templates import ChatTemplate, check_end_token, select_template
from omnilit.data.truncation import Fitted, fit_length, list_starts
from omnilit.errors import ConfigError, DataError, suggest
from omnilit.registry import Registry
from omnilit.types import IGNORE, Medium, Record, Sample

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase

Overlong: TypeAlias = Literal["truncate", "drop", "error"]
Side: TypeAlias = Literal["left", "right"]
CLASSIFICATION: Final = "classification"
DATA_TYPES: Final = ("conversation", "plaintext", CLASSIFICATION, "dpo", "diffusion")
TRANSFORMS: Final = Registry(KEY)


@dataclass(frozen=True, slots=True)
class TransformSettings:
    """How records become samples.

    Args:
        data_type: One of `DATA_TYPES`.
        text_keys: Fields with the messages or the text, of which the first one counts that a
            record has; None for those of the type.
        chat_template: See `select_template`; conversations only.
        max_seq_len: Tokens that a sample may have.
        overlong: What becomes of a longer conversation, or text of a class.
        truncation_side: The side that `overlong: truncate` cuts off.
        transform: A transform of the user's own, by its name in `TRANSFORMS` or its place.
        classes: Names of the model's classes, of which every label must be one; None where they
            are not known, or there are none.
    """

    data_type: str = "conversation"
    text_keys: tuple[str, ...] | None = None
    chat_template: str = "default"
    max_seq_len: int = 2048
    overlong: Overlong = "truncate"
    truncation_side: Side = "right"
    transform: str | None = None
    classes: tuple[str, ...] | None = None


class Transform(Protocol):
    """Turns records into samples, many at a time since tokenizers are faster so."""

    @property
    def template(self) -> ChatTemplate | None:
        """How conversations are written; None where there are none."""
        ...

    def encode(self, records: Sequence[Record]) -> Outcome:
        """The samples of the records; raises a DataError that names a bad one."""
        ...

    def check(self, record: Record) -> None:
        """See that what is trained of `record` is what should be; run on the first record."""
        ...


class OwnTransform(Transform, Protocol):
    """What `data.transform` must give when it is called with settings and tokenizer."""

    def fingerprint(self) -> str:
        """Another text whenever the same record gives other samples; tokens are cached under it."""
        ...


@dataclass(frozen=True, slots=True)
class CheckedTransform:
    """A transform of the user's own, whose samples are looked at.

    Args:
        own: The user's.
        max_seq_len: Tokens that a sample may have.
    """

    own: OwnTransform
    max_seq_len: int

    @property
    def template(self) -> ChatTemplate | None:
        """Theirs."""
        return self.own.template

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Theirs, checked; see `Transform`."""
        outcome = self.own.encode(records)
        check_samples(outcome.samples, max_seq_len=self.max_seq_len)
        return outcome

    def check(self, record: Record) -> None:
        """Theirs."""
        self.own.check(record)


@dataclass(frozen=True, slots=True)
class ConversationTransform:
    """Conversations through a chat template; one sample a record.

    Args:
        encoder: Tokenises.
        template: Says which text is trained.
        settings: Fields, length and what to do beyond it.
        media: Writes the places of images, videos and sounds; None for a model of text.
    """

    encoder: Encoder
    template: ChatTemplate
    settings: TransformSettings
    media: MediaProcessor | None = None

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Tokenise a batch; see `Transform`."""
        samples: list[Sample] = []
        num_truncated = num_cut = num_dropped = num_unsupervised = 0
        said = [self._read(record) for record in records]
        written = [self._write(one, r) for one, r in zip(said, records, strict=True)]
        encoded = encode_rendered(self.encoder, [one.rendered for one in written], records)
        for tokens, one, record, text in zip(encoded, said, records, written, strict=True):
            blocks = self._blocks(tokens, text, record)
            find = partial(_find_starts, self, one, record, text, tokens)
            fitted = fit_length(tokens, record, self.settings, find, blocks)
            if fitted.tokens is None:
                num_dropped += 1
                continue
            num_truncated += len(fitted.tokens.ids) < len(tokens.ids)
            num_cut += fitted.is_cut
            sample = self._to_sample(fitted, blocks, text.media, record)
            if count_targets(sample):
                samples.append(sample)
            else:
                num_unsupervised += 1
        return Outcome(samples, num_truncated, num_cut, num_dropped, num_unsupervised)

    def check(self, record: Record) -> None:
        """Decode what is trained and compare it with what was said; see `check_mask`."""
        conversation = self._read(record)
        self.template.check_header(conversation, record)
        rendered = self._write(conversation, record).rendered
        (tokens,) = encode_rendered(self.encoder, [rendered], [record])
        check_mask(tokens, rendered, record, self.encoder)

    def _read(self, record: Record) -> Conversation:
        conversation = to_conversation(record, self.settings.text_keys)
        limit = None if self.media is None else self.media.config.max_image_nums
        return conversation if limit is None else keep_images(conversation, limit)

    def _write(self, conversation: Conversation, record: Record) -> Expanded:
        rendered = self.template.render(conversation, record)
        if self.media is None or not conversation.media:
            return Expanded(rendered)
        return expand(rendered, conversation.media, record, self.media)

    def _blocks(self, tokens: Tokens, text: Expanded, record: Record) -> list[tuple[int, int]]:
        if self.media is None:
            return []
        return find_blocks(tokens, text.media, record, self.media)

    def _to_sample(
        self,
        fitted: Fitted,
        blocks: Sequence[tuple[int, int]],
        media: Sequence[Medium],
        record: Record,
    ) -> Sample:
        """What was kept, with the media whose places were; these are never trained."""
        assert fitted.tokens is not None
        sample = to_sample(fitted.tokens, record)
        if self.media is None or not media:
            return sample
        labels = np.where(self.media.is_place(sample.input_ids), np.int32(IGNORE), sample.labels)
        kept = [
            medium
            for medium, (start, end) in zip(media, blocks, strict=True)
            if start >= fitted.start and end <= fitted.end
        ]
        return replace(sample, labels=labels, media=tuple(kept))


@dataclass(frozen=True, slots=True)
class PreferenceTransform:
    """Preference pairs: the chosen and the rejected answer as two sequences of one sample.

    A pair is never separated, and has up to twice `max_seq_len` tokens.

    Args:
        encoder: Tokenises.
        template: Says which text is trained.
        settings: Fields, length of each sequence and what to do beyond it.
    """

    encoder: Encoder
    template: ChatTemplate
    settings: TransformSettings

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Tokenise a batch; see `Transform`."""
        samples: list[Sample] = []
        num_truncated = num_cut = num_dropped = num_unsupervised = 0
        for record in records:
            pair = to_pair(record, self.settings.text_keys)
            if any(side.media for side in pair):
                problem = "images, videos and sounds in preference pairs are not available yet"
                raise refuse(record, problem, "use data.data_type: conversation")
            written = [self.template.render(side, record) for side in pair]
            both = encode_rendered(self.encoder, written, [record] * len(written))
            fitted = [
                fit_length(
                    tokens,
                    record,
                    self.settings,
                    partial(_find_starts, self, side, record, Expanded(text), tokens),
                )
                for tokens, side, text in zip(both, pair, written, strict=True)
            ]
            sides = [to_sample(one.tokens, record) for one in fitted if one.tokens is not None]
            if len(sides) < 2:
                num_dropped += 1
                continue
            pairs = zip(sides, both, strict=True)
            num_truncated += any(len(side) < len(tokens.ids) for side, tokens in pairs)
            num_cut += any(one.is_cut for one in fitted)
            if all(map(count_targets, sides)):
                samples.append(_join_pair(*sides))
            else:
                num_unsupervised += 1
        return Outcome(samples, num_truncated, num_cut, num_dropped, num_unsupervised)

    def check(self, record: Record) -> None:
        """Decode what is trained of both answers; see `check_mask`."""
        for conversation in to_pair(record, self.settings.text_keys):
            rendered = self.template.render(conversation, record)
            (tokens,) = encode_rendered(self.encoder, [rendered], [record])
            check_mask(tokens, rendered, record, self.encoder)


@dataclass(frozen=True, slots=True)
class PlaintextTransform:
    """Texts, each ended by the end-of-text token, cut in chunks without losing a token.

    Every token but a chunk's first is a target. A last chunk of one token has none; it is kept.
    A text without tokens is refused.

    Args:
        encoder: Tokenises.
        settings: Fields and length of the chunks.
        end_id: The end-of-text token.
    """

    encoder: Encoder
    settings: TransformSettings
    end_id: int
    template: None = None

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Tokenise a batch; see `Transform`."""
        size = self.settings.max_seq_len
        texts = [to_text(record, self.settings.text_keys) for record in records]
        samples: list[Sample] = []
        for ids, record in zip(encode_ids(self.encoder, texts), records, strict=True):
            if not len(ids):
                problem = "the text is empty, so no token of it is trained"
                raise refuse(record, problem, "write one, or remove the record")
            ended = np.append(ids, np.int32(self.end_id))
            chunks = [ended[start : start + size] for start in range(0, len(ended), size)]
            samples += [Sample(chunk, chunk, record.origin) for chunk in chunks]
        return Outcome(samples)

    def check(self, record: Record) -> None:
        """Nothing to see: everything is trained."""


@dataclass(frozen=True, slots=True)
class ClassificationTransform:
    """Texts with the special tokens of the tokenizer's own; the last token's label is the class.

    A conversation is the text that the chat template makes of it, which has its special tokens.
    Of a longer text the first `max_seq_len` tokens are kept, unless the settings say otherwise.

    Args:
        tokenizer: Adds its special tokens.
        settings: Fields, classes, length and what to do beyond it.
        template: Writes conversations; None where there is none.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: TransformSettings
    template: ChatTemplate | None = None

    def encode(self, records: Sequence[Record]) -> Outcome:
        """Tokenise a batch; see `Transform`."""
        limit, overlong = self.settings.max_seq_len, self.settings.overlong
        samples, num_truncated, num_dropped = [], 0, 0
        keys, classes = self.settings.text_keys, self.settings.classes
        found = [to_labelled(record, keys, classes) for record in records]
        encoded = self._encode([said for said, _ in found], records)
        for ids, (_, label), record in zip(encoded, found, records, strict=True):
            if not ids:
                raise refuse(record, "the text has no token", "write one, or remove the record")
            if len(ids) > limit and overlong == "error":
                problem = f"the record has {len(ids)} tokens, data.max_seq_len is {limit}"
                fix = "raise data.max_seq_len, or set data.overlong to truncate or drop"
                raise refuse(record, problem, fix)
            if len(ids) > limit and overlong == "drop":
                num_dropped += 1
                continue
            num_truncated += len(ids) > limit
            kept = np.asarray(ids[:limit], np.int32)
            labels = np.full(len(kept), IGNORE, np.int32)
            labels[-1] = label
            samples.append(Sample(kept, labels, record.origin))
        return Outcome(samples, num_truncated, num_dropped=num_dropped)

    def check(self, record: Record) -> None:
        """Nothing to see: there is one label."""

    def _encode(
        self, said: Sequence[str | Conversation], records: Sequence[Record]
    ) -> list[list[int]]:
        """The ids of each text, and of each conversation as the template writes it."""
        texts = [one for one in said if isinstance(one, str)]
        written = [
            self._write(one, record)
            for one, record in zip(said, records, strict=True)
            if not isinstance(one, str)
        ]
        plain: Any = self.tokenizer(texts)["input_ids"] if texts else []
        templated: Any = (
            self.tokenizer(written, add_special_tokens=False)["input_ids"] if written else []
        )
        left = iter(plain), iter(templated)
        return [next(left[not isinstance(one, str)]) for one in said]

    def _write(self, conversation: Conversation, record: Record) -> str:
        if self.template is None:
            problem = "the record has messages, and the tokenizer has neither a chat template nor "
            fix = "name a data.chat_template, or give the record a text"
            raise refuse(record, f"{problem}an eos_token for the plain one", fix)
        return self.template.write(conversation, record)


@dataclass(frozen=True, slots=True)
class DiffusionCheck:
    """Records of images or latents with a prompt: read and checked, not tokenised."""

    template: None = None

    def encode(self, records: Sequence[Record]) -> Outcome:
        """No samples; see `Transform`."""
        for record in records:
            check_diffusion(record)
        return Outcome([])

    def check(self, record: Record) -> None:
        """Nothing to see beyond `encode`."""


def build_transform(
    settings: TransformSettings,
    tokenizer: PreTrainedTokenizerBase,
    media: MediaProcessor | None = None,
) -> Transform:
    """The transform of a type of data.

    Args:
        settings: Say which one.
        tokenizer: The model's.
        media: Of a model that takes images, videos or sounds.

    Raises:
        ConfigError: An unknown type of data, a template or a tokenizer that cannot be used.
    """
    kind = settings.data_type
    if settings.transform is not None:
        own = TRANSFORMS.load(settings.transform)(settings, tokenizer)
        return CheckedTransform(own, settings.max_seq_len)
    if kind not in DATA_TYPES:
        hint = suggest(kind, DATA_TYPES)
        raise ConfigError(
            key="data.data_type",
            problem=f"{kind!r} is not known{f'.{hint}' if hint else ''}",
            fix=f"use one of {', '.join(DATA_TYPES)}",
        )
    if kind == "diffusion":
        return DiffusionCheck()
    if kind == CLASSIFICATION:
        can_write = tokenizer.chat_template or isinstance(tokenizer.eos_token_id, int)
        has_template = can_write or settings.chat_template != "default"  # texts need none
        template = select_template(settings.chat_template, tokenizer) if has_template else None
        return ClassificationTransform(tokenizer, settings, template)
    encoder = Encoder.of(tokenizer)
    if kind == "plaintext":
        return PlaintextTransform(encoder, settings, check_end_token(tokenizer))
    processor = None if media is None else media.processor
    template = select_template(settings.chat_template, tokenizer, processor)
    if kind == "dpo":
        return PreferenceTransform(encoder, template, settings)
    return ConversationTransform(encoder, template, settings, media)


def encode_or_skip(transform: Transform, records: Sequence[Record], *, is_silent: bool) -> Outcome:
    """`transform.encode`; where bad records are skipped, each is found and left out.

    Raises:
        DataError: A record is bad and must not be skipped.
    """
    try:
        return transform.encode(records)
    except DataError:
        if not is_silent:
            raise
    if len(records) == 1:
        try:
            return transform.encode(records)
        except DataError as error:
            origin = records[0].origin
            bad = BadRecord.of(error, source=origin.source, file=origin.file, row=origin.row)
            return Outcome([], bad=(bad,))
    half = len(records) // 2
    parts = [
        encode_or_skip(transform, part, is_silent=True) for part in (records[:half], records[half:])
    ]
    return join_outcomes(parts)


def _find_starts(
    transform: ConversationTransform | PreferenceTransform,
    conversation: Conversation,
    record: Record,
    text: Expanded,
    tokens: Tokens,
) -> list[int]:
    """Tokens with which a conversation may begin that loses its first messages."""
    before = text.before or text.rendered
    chars = map(text.find, transform.template.find_starts(conversation, record, before.text))
    places = find_tokens(transform.encoder, text.rendered, tokens, list(chars))
    return list_starts(conversation.turns, places)


def _join_pair(chosen: Sample, rejected: Sample) -> Sample:
    weights = None
    if chosen.weights is not None or rejected.weights is not None:
        sides = (chosen, rejected)
        ones = [np.ones(len(s), np.float32) if s.weights is None else s.weights for s in sides]
        weights = np.concatenate(ones)
    return Sample(
        np.concatenate([chosen.input_ids, rejected.input_ids]),
        np.concatenate([chosen.labels, rejected.labels]),
        chosen.origin,
        weights,
        len(chosen),
    )
