"""Chat templates: a conversation as one text, with the characters that are trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from omnilit.data.messages import ASSISTANT, Turn, refuse
from omnilit.errors import ConfigError, DataError, suggest
from omnilit.types import Record

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase

TEMPLATES: Final = ("default", "plain", "tokenizer")

# "User: ...<eos>\nAssistant: ...<eos>\n", the reference's own rendering for any tokenizer.
PLAIN: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as a template writes it.

    Args:
        text: All of it.
        spans: Character ranges [start, end) that are trained, ascending and apart: a turn's
            words and its end token, never its header.
    """

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A jinja template bound to the special tokens that it may name.

    Args:
        name: `plain` or `tokenizer`.
        jinja: Its source; what `save_pretrained` should write beside a model trained with it.
        special_tokens: Names such as `eos_token` and their texts.
    """

    name: str
    jinja: str
    special_tokens: Mapping[str, str]

    @property
    def has_generation(self) -> bool:
        """True where the template itself marks what the assistant says."""
        return GENERATION.search(self.jinja) is not None

    def render(self, turns: Sequence[Turn], record: Record) -> Rendered:
        """Write a conversation and find what is trained in it.

        Where the template has `{% generation %}`, that says it. Else the text of a trained turn
        is what a rendering that ends after the turn adds to one that ends before it, the
        generation prompt included; the same is done for a user's turn with `loss_mask` 1.

        Raises:
            DataError: The template refuses the conversation, rewrites an earlier turn, or ends
                an assistant's turn without an end token; names the turn.
        """
        if self.has_generation and all(t.role == ASSISTANT for t in turns if t.is_trained):
            return self._render_marked(turns, record)
        text = self._write(turns, record)
        spans = [self._find_turn(turns, i, text, record) for i, t in enumerate(turns) if t[2]]
        return Rendered(text, spans)

    def check_header(self, turns: Sequence[Turn], record: Record) -> None:
        """See that no header is trained: what stands in front of the model at inference.

        Raises:
            DataError: The template's `{% generation %}` begins before the assistant's words.
        """
        first = next((i for i, t in enumerate(turns) if t.is_trained), None)
        if first is None or turns[first].role != ASSISTANT or first == 0:
            return
        rendered = self.render(turns, record)
        prompt = self._write(turns[:first], record, is_prompt=True)
        start = rendered.spans[0][0]
        if rendered.text.startswith(prompt) and start < len(prompt):
            raise refuse(
                record,
                f"the chat template marks the header {prompt[start:]!r} as the assistant's words",
                "begin {% generation %} after the header",
            )

    def _render_marked(self, turns: Sequence[Turn], record: Record) -> Rendered:
        text, found = self._call(turns, record, is_marked=True)
        spans = [(start, end) for start, end in found if end > start]
        said = [turn for turn in turns if turn.role == ASSISTANT]
        if len(spans) != len(said):
            raise refuse(
                record,
                f"the chat template marks {len(spans)} spans for {len(said)} assistant messages",
                "put each assistant message, and nothing else, into one {% generation %} block",
            )
        for (start, end), turn in zip(spans, said, strict=True):
            if _ends_bare(text[start:end], turn.content):
                raise refuse(
                    record,
                    "the chat template's {% generation %} leaves out the end token of "
                    f"the assistant's turn {text[start:end][-40:]!r}",
                    "move the end token in front of {% endgeneration %}",
                )
        trained = [s for s, turn in zip(spans, said, strict=True) if turn.is_trained]
        return Rendered(text, trained)

    def _find_turn(
        self, turns: Sequence[Turn], index: int, text: str, record: Record
    ) -> tuple[int, int]:
        turn, number = turns[index], index + 1
        is_assistant = turn.role == ASSISTANT
        before = self._write(turns[:index], record, is_prompt=is_assistant)
        after = self._write(turns[:number], record) if number < len(turns) else text
        if not (text.startswith(after) and after.startswith(before)):
            raise refuse(
                record,
                f"the chat template rewrites message {number} when others follow it, or begins it "
                "otherwise than its generation prompt",
                "use a template with {% generation %}, or data.chat_template: plain",
            )
        piece = after[len(before) :].rstrip()
        if _ends_bare(piece, turn.content) or turn.content.strip() not in piece:
            raise refuse(
                record,
                f"the chat template writes no end token after message {number}, or changes it",
                "use a template with {% generation %}, or data.chat_template: plain",
            )
        end = len(before) + len(piece)
        if is_assistant:
            return len(before), end
        return len(before) + piece.rfind(turn.content.strip()), end

    def _write(self, turns: Sequence[Turn], record: Record, *, is_prompt: bool = False) -> str:
        if not turns and not is_prompt:
            return ""
        return self._call(turns, record, is_prompt=is_prompt)[0]

    def _call(
        self,
        turns: Sequence[Turn],
        record: Record,
        *,
        is_prompt: bool = False,
        is_marked: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        arguments: dict[str, Any] = {
            **self.special_tokens,
            "conversations": [[{"role": t.role, "content": t.content} for t in turns]],
            "chat_template": self.jinja,
            "return_assistant_tokens_mask": is_marked,
            "add_generation_prompt": is_prompt,
        }
        try:
            texts, spans = render_jinja_template(**arguments)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn.role for turn in turns) or "no message"
            raise refuse(
                record,
                f"the chat template refuses the conversation ({error}; roles: {roles})",
                "change the record, or use data.chat_template: plain",
            ) from error
        found = [(int(start), int(end)) for start, end in spans[0]] if is_marked else []
        return texts[0], found


def select_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that `data.chat_template` names.

    Args:
        name: `default` (the tokenizer's own where it has one, else `plain`), `plain`, or
            `tokenizer`.
        tokenizer: Gives the special tokens and its own template.

    Raises:
        ConfigError: No such name, `tokenizer` where it has no template, or `plain` where it has
            no end-of-text token.
    """
    key = "data.chat_template"
    if name not in TEMPLATES:
        raise ConfigError(
            key=key,
            problem=f"{name!r} is not known.{suggest(name, TEMPLATES)}",
            fix=f"use one of {', '.join(TEMPLATES)}",
        )
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if name != "plain" and tokenizer.chat_template:
        try:
            return ChatTemplate("tokenizer", tokenizer.get_chat_template(), special)
        except ValueError as error:  # several named templates, none of them the default
            raise ConfigError(
                key=key, problem=str(error), fix="name one 'default', or use plain"
            ) from error
    if name == "tokenizer":
        raise ConfigError(
            key=key,
            problem="the tokenizer has no chat template",
            fix="use plain, or a tokenizer with a chat_template",
        )
    check_end_token(tokenizer)
    return ChatTemplate("plain", PLAIN, special)


def check_end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text.

    Raises:
        ConfigError: The tokenizer has none, so that a model could not learn to stop.
    """
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    raise ConfigError(
        key="model.tokenizer_path",
        problem="the tokenizer has no eos_token, so no text could be ended",
        fix='name one in its tokenizer_config.json, as "eos_token": "<|endoftext|>"',
    )


def _ends_bare(piece: str, content: str) -> bool:
    """True where `piece` holds the words of a turn and nothing after them."""
    words = content.strip()
    return bool(words) and words in piece and not piece.rpartition(words)[2].strip()


def mask_error(record: Record, said: str, read: str) -> DataError:
    """What is raised when the trained tokens do not read as the words they stand for."""
    return refuse(
        record,
        f"the trained tokens read {read!r}, the text says {said!r}",
        "use another data.chat_template; the tokenizer cannot be masked exactly with this one",
    )
