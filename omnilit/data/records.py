"""What a record says, whichever of the known forms it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from omnilit.data.messages import (
    ASSISTANT,
    Conversation,
    Turn,
    check_text,
    check_trained,
    read_messages,
    read_tools,
    refuse,
)
from omnilit.data.references import KINDS, MARK, is_place, place_media, read_columns
from omnilit.types import Medium, Record

TEXT: Final = ("content_split", "text", "content")
MEDIA: Final = ("image", "images", "video", "videos", "latents")
MAX_CLASSES: Final = 2**31  # labels are int32
MAX_DIGITS: Final = 40  # of a label that is read, or shown
MAX_LISTED: Final = 8  # names of classes in a message
# The fields of every known form, by type of data
SCHEMAS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "plaintext": tuple((name,) for name in TEXT),
    "conversation": (
        ("messages",),
        ("conversations",),
        ("instruction", "output"),
        ("prompt", "completion"),
        ("prompt", "response"),
        ("question", "answer"),
    ),
    "classification": (("text", "label"), ("messages", "label")),
    "dpo": (("chosen", "rejected"), ("prompt", "chosen", "rejected")),
    "diffusion": tuple(("prompt", name) for name in MEDIA),
}
SPEAKERS: Final = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "function": "tool",
    "observation": "tool",
    "function_call": ASSISTANT,
}


class Labelled(NamedTuple):
    """A text, or a conversation, and the number of its class."""

    said: str | Conversation
    label: int


class PreferencePair(NamedTuple):
    """Two conversations with the same beginning, of which only the last answer is trained."""

    chosen: Conversation
    rejected: Conversation


def to_conversation(record: Record, text_keys: Sequence[str] | None) -> Conversation:
    """The conversation of a record: messages, ShareGPT, Alpaca, or prompt and completion.

    Args:
        record: Its fields say which form it has.
        text_keys: Fields that hold messages or a text to answer; the first one there counts.

    Raises:
        DataError: No form fits, or something in it is malformed, or nothing is trained.
    """
    if text_keys is not None:
        key = _first_key(record, text_keys)
        return _trained(record, _read_list(record, record.fields[key], key))
    for names, read in READERS:
        if all(record.fields.get(name) is not None for name in names):
            return _trained(record, read(record))
    raise undetected(record, "conversation")


def to_question(record: Record) -> Conversation:
    """The conversation of a record that is to be answered: its `messages`, or its `prompt`.

    Media of a column, such as `images`, stand in front of a `prompt` that has no place for any of
    their kind.

    Raises:
        DataError: It has neither, does not end with a question, or something in it is malformed.
    """
    if record.fields.get("messages") is not None:
        turns = _read_list(record, record.fields["messages"], "messages")
        if not turns:
            raise refuse(record, "'messages' is empty", "give it a question")
        if turns[-1].role == ASSISTANT:
            raise refuse(record, "the last message is the assistant's", "end with a question")
    elif record.fields.get("prompt") is not None:
        text = check_text(record, record.fields["prompt"], "the field 'prompt'")
        places = {f"<{kind}>": len(media) for kind, media in read_columns(record).items()}
        first = "".join(place * number for place, number in places.items() if place not in text)
        turns = (Turn("user", first + text, 0.0),)
    else:
        problem = f"the record has neither 'messages' nor 'prompt': {_show(record.fields)}"
        raise refuse(record, problem, "give it one of them")
    return Conversation(_with_columns(record, turns), read_tools(record))


def to_text(record: Record, text_keys: Sequence[str] | None) -> str:
    """The text of a record of plain text.

    Raises:
        DataError: There is none, or it is no string.
    """
    key = _key_of(record, text_keys, TEXT, "plaintext")
    return check_text(record, record.fields[key], f"the field {key!r}")


def to_labelled(
    record: Record, text_keys: Sequence[str] | None, classes: Sequence[str] | None = None
) -> Labelled:
    """What a record says, a text or messages, and its class.

    Args:
        record: With a `label`: a number, or the name of a class.
        text_keys: Fields that hold a text or messages; the first one there counts.
        classes: Names of the classes by number; None where they are not known, and any number is
            one.

    Raises:
        DataError: One of the two is missing, or the label is no class.
    """
    key = _key_of(record, text_keys, ("text", "messages", "conversations"), "classification")
    value = record.fields[key]
    said: str | Conversation
    if isinstance(value, list) or (text_keys is None and key != "text"):
        said = Conversation(_read_list(record, value, key), read_tools(record))
    else:
        said = check_text(record, value, f"the field {key!r}")
    return Labelled(said, _read_label(record, classes))


def _read_label(record: Record, classes: Sequence[str] | None) -> int:
    label = record.fields.get("label")
    if label is None:
        has = _show(record.fields)
        raise refuse(record, f"the record has no 'label'; its fields are: {has}", "give it one")
    if classes is not None and label in classes:
        return classes.index(label)
    if isinstance(label, str) and label.strip().isdecimal() and len(label) <= MAX_DIGITS:
        label = int(label)
    limit = MAX_CLASSES if classes is None else len(classes)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < limit:
        return label
    shown = repr(label)
    shown = shown if len(shown) <= MAX_DIGITS else f"{shown[:MAX_DIGITS]}..."
    if classes is None:
        fix = "give the number of the class, 0 or more"
        raise refuse(record, f"the label is {shown}, not the number of a class", fix)
    known = ", ".join(classes[:MAX_LISTED]) + (", ..." if len(classes) > MAX_LISTED else "")
    raise refuse(
        record,
        f"the label is {shown}, none of the model's {limit} classes ({known})",
        f"give a name of model.label_names, or a number from 0 to {limit - 1}",
    )


def to_pair(record: Record, text_keys: Sequence[str] | None) -> PreferencePair:
    """The preference pair of a record: messages, or texts with a prompt.

    Raises:
        DataError: A field is missing or malformed, or the two answers are equal.
    """
    key = _key_of(record, text_keys, ("chosen",), "dpo")
    if record.fields.get("rejected") is None:
        raise undetected(record, "dpo")
    pair = PreferencePair(_side(record, key), _side(record, "rejected"))
    if pair.chosen.turns == pair.rejected.turns:
        raise refuse(record, "'chosen' and 'rejected' are equal", "remove the record")
    return pair


def check_diffusion(record: Record) -> None:
    """See that a record has a prompt and something to make of it.

    Raises:
        DataError: It lacks one, or the prompt is no string.
    """
    key = next((name for name in ("prompt", "text") if name in record.fields), None)
    if key is None or all(record.fields.get(name) is None for name in MEDIA):
        raise undetected(record, "diffusion")
    check_text(record, record.fields[key], f"the field {key!r}")


def undetected(record: Record, data_type: str) -> Exception:
    """An error that shows the fields of a record and the forms that are known."""
    known = "; ".join(" + ".join(names) for names in SCHEMAS[data_type])
    others = [
        kind
        for kind, forms in SCHEMAS.items()
        if kind != data_type and any(set(names) <= set(record.fields) for names in forms)
    ]
    hint = f" They fit data.data_type: {' or '.join(others)}." if others else ""
    return refuse(
        record,
        f"the record is none of data_type: {data_type}; its fields are: {_show(record.fields)}."
        f"{hint} Known are: {known}",
        "name the field in data.text_keys, or rename the fields",
    )


def _first_key(record: Record, names: Sequence[str]) -> str:
    key = next((name for name in names if record.fields.get(name) is not None), None)
    if key is None:
        wanted = " or ".join(map(repr, names))
        raise refuse(
            record,
            f"the record has no field {wanted}; its fields are: {_show(record.fields)}",
            "set data.text_keys to the field that holds the text or messages",
        )
    return key


def _key_of(
    record: Record, text_keys: Sequence[str] | None, own: Sequence[str], data_type: str
) -> str:
    if text_keys is not None:
        return _first_key(record, text_keys)
    if all(record.fields.get(name) is None for name in own):
        raise undetected(record, data_type)
    return _first_key(record, own)


def _trained(record: Record, turns: tuple[Turn, ...]) -> Conversation:
    turns = _with_columns(record, turns)
    return check_trained(record, Conversation(turns, read_tools(record)))


def _with_columns(record: Record, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with what columns such as `images` hold in its places, in order.

    A place is `<image>` in a text, or a part of type `image` that says nothing more.
    """
    columns = read_columns(record)
    if not columns and not any(turn.media for turn in turns):
        return turns
    left = {kind: iter(media) for kind, media in columns.items()}
    counts = dict.fromkeys(KINDS.values(), 0)
    placed = [
        turn if turn.media else turn._replace(content=place_media(record, turn.content, columns))
        for turn in turns
    ]
    filled: list[Turn] = []
    for turn in placed:
        given, media = iter(turn.media), list[Medium]()
        for mark in MARK.findall(turn.content):
            kind = KINDS[mark]
            own = next(given, None)
            if own is None or is_place(own):
                counts[kind] += 1
                own = next(left.get(kind, iter(())), own)
            media.append(own or Medium(kind))
        filled.append(turn._replace(media=tuple(media)))
    for kind, count in counts.items():
        if count != (number := len(columns.get(kind, ()))):
            raise refuse(
                record,
                f"the text has {count} places for {kind}s from a column, the record {number}",
                f"write <{kind}> once for each",
            )
    return tuple(filled)


def _read_list(record: Record, value: Any, key: str) -> tuple[Turn, ...]:
    """Messages in either spelling: role and content, or from and value."""
    is_list = isinstance(value, list) and bool(value)
    if is_list and isinstance(value[0], Mapping) and "from" in value[0]:
        value = [_from_sharegpt(message) for message in value]
    return read_messages(record, value, what=f"the field {key!r}")


def _from_sharegpt(message: object) -> object:
    if not isinstance(message, Mapping):
        return message
    extra = {k: v for k, v in message.items() if k not in ("from", "value")}
    speaker = message.get("from")
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if speaker == "function_call":
        return {"role": role, "content": None, "tool_calls": f"[{message.get('value')}]", **extra}
    return {"role": role, "content": message.get("value"), **extra}


def _read_sharegpt(record: Record) -> tuple[Turn, ...]:
    turns = _read_list(record, record.fields["conversations"], "conversations")
    return _system(record) + turns


def _read_alpaca(record: Record) -> tuple[Turn, ...]:
    question = check_text(record, record.fields["instruction"], "the instruction")
    if extra := check_text(record, record.fields.get("input") or "", "the input"):
        question = f"{question}\n\n{extra}"
    answer = check_text(record, record.fields["output"], "the output")
    return (*_system(record), Turn("user", question, 0.0), Turn(ASSISTANT, answer, 1.0))


def _read_answered(question: str, answer: str) -> Callable[[Record], tuple[Turn, ...]]:
    def read(record: Record) -> tuple[Turn, ...]:
        asked = _as_turns(record, question, "user")
        said = _as_turns(record, answer, ASSISTANT)
        return _system(record) + tuple(t._replace(weight=0.0) for t in asked) + said

    return read


def _as_turns(record: Record, key: str, role: str) -> tuple[Turn, ...]:
    """A field that is one turn's text, or a list of messages."""
    value: Any = record.fields[key]
    if isinstance(value, list):
        return _read_list(record, value, key)
    weight = 1.0 if role == ASSISTANT else 0.0
    return (Turn(role, check_text(record, value, f"the field {key!r}"), weight),)


def _system(record: Record) -> tuple[Turn, ...]:
    text = record.fields.get("system")
    return (Turn("system", check_text(record, text, "the system prompt"), 0.0),) if text else ()


def _side(record: Record, key: str) -> Conversation:
    """One answer behind what comes before it, which is not trained."""
    turns = _as_turns(record, key, ASSISTANT)
    if record.fields.get("prompt") is not None:
        turns = _as_turns(record, "prompt", "user") + turns
    if not turns or turns[-1].role != ASSISTANT:
        problem = f"{key!r} does not end with an assistant message"
        raise refuse(record, problem, "end it with the answer")
    context = (*_system(record), *(turn._replace(weight=0.0) for turn in turns[:-1]))
    return Conversation((*context, turns[-1]._replace(weight=1.0)), read_tools(record))


def _show(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "none"


READERS: Final[tuple[tuple[tuple[str, ...], Callable[[Record], tuple[Turn, ...]]], ...]] = (
    (("messages",), lambda r: _read_list(r, r.fields["messages"], "messages")),
    (("conversations",), _read_sharegpt),
    (("instruction", "output"), _read_alpaca),
    (("prompt", "completion"), _read_answered("prompt", "completion")),
    (("prompt", "response"), _read_answered("prompt", "response")),
    (("question", "answer"), _read_answered("question", "answer")),
)
