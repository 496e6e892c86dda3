"""Chat templates: a conversation as one text, with the characters that are trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from omnilit.data import template_texts
from omnilit.data.anchors import Written
from omnilit.data.messages import ASSISTANT, REASONING, Conversation, Turn, refuse
from omnilit.data.references import KINDS, MARK
from omnilit.data.spans import find_end, find_span, is_ended, says_all
from omnilit.errors import ConfigError, DataError, suggest
from omnilit.registry import Registry
from omnilit.types import Origin, Record

if TYPE_CHECKING:  # workers import this package, and need no tokenizer
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

TEMPLATES: Final = ("default", "plain", "tokenizer", "chatml", "llama2", "gpt_oss")
# Names of the reference for the template that comes with a model's processor
OF_PROCESSOR: Final = ("qwen2vl", "qwen2_5vl", "qwen3vl", "qwen2_5omni", "qwen3moe")
FILES: Final = (".jinja", ".jinja2", ".j2")
# Of the templates that come with omnilit: their text, and the tokens that it writes
BUILT_IN: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "plain": (template_texts.PLAIN, ()),
    "chatml": (template_texts.CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2": (template_texts.LLAMA2, ()),
    "gpt_oss": (
        template_texts.GPT_OSS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    ),
}
NEEDS_END: Final = ("plain", "llama2")  # those that write the tokenizer's eos_token
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
KEY: Final = "data.chat_template"
CHAT_TEMPLATES: Final = Registry(KEY)  # of the user's own: a name, and where the jinja text is


class Rendered(NamedTuple):
    """A conversation as a template writes it.

    Args:
        text: All of it.
        spans: Character ranges [start, end) that are trained, ascending and apart: a turn's
            words and its end token, never its header.
        weights: How much each of them counts.
    """

    text: str
    spans: list[tuple[int, int]]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A jinja template bound to the special tokens that it may name.

    Args:
        name: One of `TEMPLATES` or `CHAT_TEMPLATES`, or a file.
        jinja: Its source; what `save_pretrained` should write beside a model trained with it.
        special_tokens: Names such as `eos_token` and their texts.
        end_tokens: Texts of the special tokens, one of which ends a turn.
        parts: Which turns are handed over as lists of parts: `never` any, those with `media`, or
            `always` all.
    """

    name: str
    jinja: str
    special_tokens: Mapping[str, str]
    end_tokens: tuple[str, ...] = ()
    parts: Literal["never", "media", "always"] = "never"

    @property
    def has_generation(self) -> bool:
        """True where the template itself marks what the assistant says."""
        return GENERATION.search(self.jinja) is not None

    def render(self, conversation: Conversation, record: Record) -> Rendered:
        """Write a conversation and find what is trained in it.

        Where the template has `{% generation %}`, that says it. Else the text of a trained turn
        is what a rendering that ends after the turn adds to one that ends before it, the
        generation prompt included. Where the template rewrites a turn when others follow it,
        such as by leaving out thoughts, both ends are found in the whole text from a word put
        into the turn, or into the one before it; see `find_span`.

        Raises:
            DataError: The template refuses the conversation, cannot write a part of it, ends a
                trained turn without an end token, or hides where it stands; names the turn.
        """
        self._check_features(conversation, record)
        turns = conversation.turns
        if self.has_generation and all(t.role == ASSISTANT for t in turns if t.weight > 0):
            return self._render_marked(conversation, record)
        written = self._write(conversation, record)
        found = [
            (find_span(written, index), turn.weight)
            for index, turn in enumerate(turns)
            if turn.weight > 0
        ]
        return Rendered(written.text, [s for s, _ in found], [weight for _, weight in found])

    def write(self, conversation: Conversation, record: Record, *, is_prompt: bool = False) -> str:
        """The text of a conversation of which nothing is trained.

        Args:
            conversation: What was said.
            record: It came from.
            is_prompt: Whether the header of the next answer stands behind it.

        Raises:
            DataError: The template refuses it, or cannot write a part of it.
        """
        self._check_features(conversation, record)
        return self._call(conversation.turns, conversation.tools, record, is_prompt=is_prompt)[0]

    def find_starts(self, conversation: Conversation, record: Record, text: str) -> list[int]:
        """Where each turn's header begins in the text of all; -1 where that cannot be told."""
        written = self._written(conversation, record, text)
        ends = [find_end(written, index) for index in range(len(conversation.turns) - 1)]
        found = [-1 if end is None else len(text) - len(text[end:].lstrip()) for end in ends]
        return [0, *found]

    def check_header(self, conversation: Conversation, record: Record) -> None:
        """See that no header is trained: what stands in front of the model at inference.

        Raises:
            DataError: The template's `{% generation %}` begins before the assistant's words.
        """
        turns = conversation.turns
        first = next((i for i, t in enumerate(turns) if t.weight > 0), None)
        if first is None or turns[first].role != ASSISTANT or first == 0:
            return
        rendered = self.render(conversation, record)
        prompt = self._written(conversation, record, "").write(turns[:first], is_prompt=True)
        start = rendered.spans[0][0]
        if rendered.text.startswith(prompt) and start < len(prompt):
            raise refuse(
                record,
                f"the chat template marks the header {prompt[start:]!r} as the assistant's words",
                "begin {% generation %} after the header",
            )

    def _check_features(self, conversation: Conversation, record: Record) -> None:
        """A template that does not name a field of the record would leave it out unseen."""
        used = {
            "tools": ("tools",) if conversation.tools else (),
            "tool_calls": ("tool_calls",) if any(t.tool_calls for t in conversation.turns) else (),
            "reasoning": REASONING if any(t.reasoning for t in conversation.turns) else (),
        }
        if conversation.media and self.parts == "never":
            raise refuse(
                record,
                f"the record has {conversation.media[0].kind}s, which data.chat_template: "
                f"{self.name} cannot write",
                "train a model that takes them, with the template of its processor",
            )
        for what, names in used.items():
            if names and not any(name in self.jinja for name in names):
                raise refuse(
                    record,
                    f"data.chat_template: {self.name} cannot write the record's {what}",
                    "use chatml, gpt_oss or a template that names it, or leave it out",
                )

    def _render_marked(self, conversation: Conversation, record: Record) -> Rendered:
        turns = conversation.turns
        text, found = self._call(turns, conversation.tools, record, is_marked=True)
        spans = [(start, end) for start, end in found if end > start]
        said = [turn for turn in turns if turn.role == ASSISTANT]
        if len(spans) != len(said):
            raise refuse(
                record,
                f"the chat template marks {len(spans)} spans for {len(said)} assistant messages",
                "put each assistant message, and nothing else, into one {% generation %} block",
            )
        written = self._written(conversation, record, text)
        places = [index for index, turn in enumerate(turns) if turn.role == ASSISTANT]
        for (start, end), index in zip(spans, places, strict=True):
            words = text[start:end].rstrip()
            if not says_all(written, index, words):
                raise refuse(
                    record,
                    f"the chat template does not write what the assistant says: {words[:80]!r}",
                    "use another template",
                )
            if not is_ended(written, index, words):
                raise refuse(
                    record,
                    "the chat template's {% generation %} leaves out the end token of "
                    f"the assistant's turn {words[-40:]!r}",
                    "move the end token in front of {% endgeneration %}",
                )
        trained = [(s, turn.weight) for s, turn in zip(spans, said, strict=True) if turn.weight]
        return Rendered(text, [span for span, _ in trained], [weight for _, weight in trained])

    def _write(self, conversation: Conversation, record: Record) -> Written:
        text, _ = self._call(conversation.turns, conversation.tools, record)
        return self._written(conversation, record, text)

    def _written(self, conversation: Conversation, record: Record, text: str) -> Written:
        def write(turns: Sequence[Turn], *, is_prompt: bool = False) -> str:
            if not turns and not is_prompt:
                return ""
            return self._call(turns, conversation.tools, record, is_prompt=is_prompt)[0]

        return Written(write, conversation.turns, text, self.end_tokens, record)

    def _call(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]],
        record: Record,
        *,
        is_prompt: bool = False,
        is_marked: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        arguments: dict[str, Any] = {
            **self.special_tokens,
            "conversations": [[to_message(turn, parts=self.parts) for turn in turns]],
            "tools": list(tools) or None,
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


def select_template(
    name: str, tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None = None
) -> ChatTemplate:
    """The template that `data.chat_template` names.

    Args:
        name: `default` (the tokenizer's own where it has one, else `plain`), `tokenizer`, one of
            `BUILT_IN`, the path of a jinja file, a name of `CHAT_TEMPLATES`,
            `package.module:TEXT`, or one of `OF_PROCESSOR` for the processor's own.
        tokenizer: Gives the special tokens and its own template.
        processor: Of a model that takes media; its own template goes before the tokenizer's.

    Raises:
        ConfigError: No such name or file, a file that is no jinja, `tokenizer` where it has no
            template, one of `OF_PROCESSOR` without a processor, or a tokenizer that lacks the
            tokens that a template writes.
    """
    if processor is None and name in OF_PROCESSOR:
        raise ConfigError(
            key=KEY,
            problem=f"{name} is the template of a model's processor, and there is none",
            fix="give the folder of a model with a processor, or use another template",
        )
    if processor is None:
        return _select_text(name, tokenizer)
    name = "tokenizer" if name in OF_PROCESSOR else name
    own = getattr(processor, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    if isinstance(own, str) and name in ("default", "tokenizer"):
        special = _special(tokenizer)
        return with_parts(ChatTemplate(name, own, special, _end_tokens(tokenizer, special)))
    return with_parts(_select_text(name, tokenizer))


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Names of special tokens, and their texts."""
    return {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}


def _select_text(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    special = _special(tokenizer)
    ends = _end_tokens(tokenizer, special)
    if name == "default":
        name = "tokenizer" if tokenizer.chat_template else "plain"
    if name == "tokenizer":
        return ChatTemplate(name, _own_template(tokenizer), special, ends)
    if name.endswith(FILES):
        return ChatTemplate(name, _read_template(Path(name)), special, ends)
    check_template_name(name)
    if name not in BUILT_IN:
        return ChatTemplate(name, _load_template(name), special, ends)
    jinja, tokens = BUILT_IN[name]
    if missing := [token for token in tokens if token not in tokenizer.get_vocab()]:
        raise ConfigError(
            key=KEY,
            problem=f"{name} writes {', '.join(missing)}, which the tokenizer does not have",
            fix="use another template, or add the tokens to the tokenizer and the model",
        )
    if name in NEEDS_END:
        check_end_token(tokenizer)
    return ChatTemplate(name, jinja, {"bos_token": "", **special}, ends)


def check_template_name(name: str) -> None:
    """See that `data.chat_template` names a template, or looks like a place that may hold one.

    Raises:
        ConfigError: It does not.
    """
    if name in (*TEMPLATES, *OF_PROCESSOR) or name.endswith(FILES) or name in CHAT_TEMPLATES:
        return
    known = (*TEMPLATES, *OF_PROCESSOR, *CHAT_TEMPLATES)
    hint = suggest(name, known)
    raise ConfigError(
        key=KEY,
        problem=f"{name!r} is not known{f'.{hint}' if hint else ''}",
        fix=f"use one of {', '.join(known)}, a file that ends in {' or '.join(FILES)}, or "
        "package.module:TEXT",
    )


def _end_tokens(tokenizer: PreTrainedTokenizerBase, named: Mapping[str, str]) -> tuple[str, ...]:
    """Named or marked as special; not those that only stand in words, such as <tool_call>."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    marked = [str(token) for token in added.values() if token.special]
    return tuple(dict.fromkeys([*marked, *named.values()]))


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            key=KEY,
            problem="the tokenizer has no chat template",
            fix="use plain, or a tokenizer with a chat_template",
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none of them the default
        raise ConfigError(
            key=KEY, problem=str(error), fix="name one 'default', or use plain"
        ) from error


def _read_template(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            key=KEY, problem=f"{file} cannot be read ({error})", fix="correct the path"
        ) from error
    return _check_jinja(text, str(file))


def _load_template(name: str) -> str:
    text = CHAT_TEMPLATES.load(name)
    if isinstance(text, str):
        return _check_jinja(text, name)
    raise ConfigError(
        key=KEY,
        problem=f"{name} stands for a {type(text).__name__}, not for the text of a template",
        fix="name a string of jinja",
    )


def _check_jinja(text: str, where: str) -> str:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles it
    except TemplateSyntaxError as error:
        raise ConfigError(
            key=KEY,
            problem=f"{where} is no jinja template (line {error.lineno}: {error.message})",
            fix="correct it",
        ) from error
    return text


def with_parts(template: ChatTemplate) -> ChatTemplate:
    """The template, handed parts where it reads them; as it is where it does not.

    Templates of processors differ: some read parts alone, some a text where there is only text.
    """
    word = "zqxPARTSxqz"
    said = Turn("user", word, 0.0)
    can_read = {
        parts: _says(replace(template, parts=parts), said, word) for parts in ("never", "always")
    }
    if not can_read["always"]:
        return template
    return replace(template, parts="media" if can_read["never"] else "always")


def _says(template: ChatTemplate, turn: Turn, word: str) -> bool:
    record = Record({}, Origin("", "", 0))
    try:
        text = template.render(Conversation((turn,)), record).text
    except DataError:
        return False
    return text.count(word) == 1 and "'type'" not in text


def split_parts(content: str) -> list[dict[str, str]]:
    """A text with marks as the list of parts that templates read."""
    parts = [
        {"type": KINDS[piece]} if piece in KINDS else {"type": "text", "text": piece}
        for piece in re.split(f"({MARK.pattern})", content)
        if piece
    ]
    return parts or [{"type": "text", "text": ""}]


def to_message(
    turn: Turn, *, parts: Literal["never", "media", "always"] = "never"
) -> dict[str, Any]:
    """A turn in the form that templates read."""
    has_parts = parts == "always" or (parts == "media" and bool(turn.media))
    content = split_parts(turn.content) if has_parts else turn.content
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [dict(call) for call in turn.tool_calls]
    if turn.name:
        message["name"] = turn.name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


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


def mask_error(record: Record, said: str, read: str) -> DataError:
    """What is raised when the trained tokens do not read as the words they stand for."""
    return refuse(
        record,
        f"the trained tokens read {read!r}, the text says {said!r}",
        "use another data.chat_template; the tokenizer cannot be masked exactly with this one",
    )
