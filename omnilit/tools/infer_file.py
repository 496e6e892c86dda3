"""`omnilit infer --input FILE --output FILE`: answers to all records of a file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from omnilit.data.files import list_files
from omnilit.data.readers import parse_row, read_rows
from omnilit.data.records import to_question
from omnilit.data.refusals import refuse
from omnilit.errors import DataError
from omnilit.logging import get_logger
from omnilit.models.build import stop_tokens
from omnilit.tools.chat import Chat, context_size
from omnilit.tools.file_request import FileRequest
from omnilit.tools.generation import Completion, Sampler, complete, complete_seeing
from omnilit.types import Record, Sample

log = get_logger(__name__)
COMPLETION: Final = "completion"
LOGPROBS: Final = "logprobs"
WINDOW: Final = 16  # batches that are looked through for prompts of one length, then written


@dataclass(frozen=True, slots=True)
class Prompt:
    """One record to answer.

    Args:
        number: Of the record in the input, from 0.
        record: As it was read.
        question: What the model goes on from, its media not decoded yet.
    """

    number: int
    record: Record
    question: Sample


def answer_file(request: FileRequest, chat: Chat) -> int:
    """Answer what is not answered yet; lines are written in the order of the input.

    Args:
        request: Where from and where to.
        chat: The model, its tokenizer and how tokens are chosen.

    Returns:
        How many records were answered now.

    Raises:
        DataError: A record has no question, or one too long; before any is answered. The output
            holds answers to other records.
        ConfigError: The input is no data.
    """
    prompts = list(read_prompts(request.source, chat))
    num_done = _resume(request, prompts)
    if num_done:
        log.info("%s: %d of %d records are answered", request.output, num_done, len(prompts))
    left = prompts[num_done:]
    request.output.parent.mkdir(parents=True, exist_ok=True)
    size = request.batch_size * WINDOW
    with request.output.open("a", encoding="utf-8") as file:
        for start in range(0, len(left), size):
            window = left[start : start + size]
            answers = _answer(window, chat, request.batch_size)
            for prompt in window:
                line = _line(prompt, answers[prompt.number], chat.tokenizer, request)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            log.info("answered %d of %d", num_done + start + len(window), len(prompts))
    return len(left)


def read_prompts(source: str, chat: Chat) -> Iterator[Prompt]:
    """The records of a file as prompts, through the model's chat template.

    Raises:
        DataError: A record has neither `messages` nor `prompt`, or its tokens fill the context.
        ConfigError: `source` is no data.
    """
    number = 0
    for file in list_files(source, key="--input"):
        for row in read_rows(file):
            record = parse_row(row, file=file.path, source="input")
            question = chat.reader.read(to_question(record), record)
            if len(question) >= (limit := context_size(chat.model)):
                problem = f"the prompt has {len(question)} tokens, the model's context {limit}"
                raise refuse(record, problem, "shorten it, or remove the record")
            yield Prompt(number, _as_json(record, has_media=bool(question.media)), question)
            number += 1


def _as_json(record: Record, *, has_media: bool) -> Record:
    """The record as a line of the output can hold it.

    Dates and times as ISO 8601 writes them; bytes, where the record has media, in base64.
    """

    def write(value: Any) -> str:
        if isinstance(value, date | time):
            return value.isoformat()
        if isinstance(value, bytes) and has_media:
            return base64.b64encode(value).decode()
        raise TypeError(f"{type(value).__name__} has no form in JSON")

    try:
        return replace(record, fields=json.loads(json.dumps(dict(record.fields), default=write)))
    except (TypeError, ValueError) as error:
        raise refuse(record, f"a field cannot be written ({error})", "leave it out") from error


def _answer(window: Sequence[Prompt], chat: Chat, batch_size: int) -> dict[int, Completion]:
    """Completions by the number of the prompt; prompts of one length run together.

    A model that sees is asked one by one, since it remembers positions from one call to the next.
    """
    sampler = Sampler(chat.arguments)
    stop = stop_tokens(chat.model.generation_config, chat.tokenizer)
    found: dict[int, Completion] = {}
    ordered = sorted(window, key=lambda prompt: len(prompt.question))
    for length, group in groupby(ordered, key=lambda prompt: len(prompt.question)):
        alike = list(group)
        room = min(context_size(chat.model) - length, chat.arguments.max_tokens)
        size = batch_size if chat.reader.media is None else 1
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            numbers = [prompt.number for prompt in batch]
            ids = [prompt.question.input_ids.tolist() for prompt in batch]
            if chat.reader.media is None:
                completions = complete(
                    chat.model, ids, numbers, sampler, max_new_tokens=room, stop=stop
                )
            else:
                seen = chat.reader.load(batch[0].question, chat.model.device)
                one = complete_seeing(
                    chat.model, ids[0], seen, numbers[0], sampler, max_new_tokens=room, stop=stop
                )
                completions = [one]
            found |= dict(zip(numbers, completions, strict=True))
    return found


def _line(
    prompt: Prompt,
    completion: Completion,
    tokenizer: PreTrainedTokenizerBase,
    request: FileRequest,
) -> dict[str, Any]:
    text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
    line = {**prompt.record.fields, COMPLETION: text}
    if request.has_logprobs:
        line[LOGPROBS] = completion.logprobs
    return line


def _resume(request: FileRequest, prompts: Sequence[Prompt]) -> int:
    """How many prompts the output answers; a last line that was cut off is taken away."""
    output = request.output
    if not output.exists():
        return 0
    content = output.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    lines = whole.splitlines() if whole else []
    if len(lines) + bool(rest) > len(prompts):
        raise _other_records(output, len(prompts) + 1)
    for row, (line, prompt) in enumerate(zip(lines, prompts, strict=False), start=1):
        if not _is_answer(line, prompt.record.fields):
            raise _other_records(output, row)
        if request.has_logprobs and LOGPROBS not in json.loads(line):
            raise DataError(
                problem=f"the line has no {LOGPROBS}, which are asked for now",
                fix="name another --output, remove the file, or leave --logprobs out",
                file=str(output),
                row=row,
            )
    if rest:
        if not _is_cut(rest, prompts[len(lines)].record.fields):
            raise _other_records(output, len(lines) + 1)
        output.write_bytes(content[: len(content) - len(rest)])
    return len(lines)


def _is_answer(line: bytes, fields: Mapping[str, Any]) -> bool:
    try:
        found: Any = json.loads(line)
    except ValueError:
        return False
    if not isinstance(found, dict) or COMPLETION not in found:
        return False
    asked = {name: value for name, value in fields.items() if name not in (COMPLETION, LOGPROBS)}
    return all(found.get(name) == value for name, value in asked.items())


def _is_cut(rest: bytes, fields: Mapping[str, Any]) -> bool:
    """Whether a last line without an end is the answer to a record, as far as it goes."""
    try:
        json.loads(rest)
    except ValueError:
        before = dict(takewhile(lambda item: item[0] != COMPLETION, fields.items()))
        start = json.dumps(before, ensure_ascii=False)[:-1].encode()
        return rest.startswith(start) or start.startswith(rest)
    return _is_answer(rest, fields)


def _other_records(output: Path, row: int) -> DataError:
    return DataError(
        problem="the line is no answer to the input's record of that number",
        fix="name another --output, or remove the file",
        file=str(output),
        row=row,
    )
