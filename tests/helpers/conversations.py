"""Random conversations, and what each template should write of them, in plain string code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tests.helpers.tokenizers import CHATML, CHATML_MARKED

PIECES = (
    *("the", " ", "\n", "\n\n", "  ", "Paris", "!", "caf\u00e9", "\u4f60\u597d", "\U0001f600"),
    *(
        "def f():\n    return 1",
        "assistant",
        "User: ",
        "\t",
        "0",
        "'s",
        "fox jumps",
        "<b>",
        "[/INST]",
    ),
    *("<think>", "user\n", "a", "\u00e9\u0301", "{{ x }}", "\\n", "final"),
)
Part = tuple[str, bool]  # characters, and whether they are trained
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Oracle = Callable[[Messages, Tools], list[Part]]

# Writes thoughts of the last turn only, and an empty thought where it has none; as Qwen3 does
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Headers on lines of their own, and a beginning of the text; as Llama 3 does
HEADERS = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '<|endoftext|>\\n\\n' + (m.content | trim) + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant<|endoftext|>\\n\\n' }}{% endif %}"
)
# Another name for the assistant, and trimmed words; as Gemma does
RENAMING = (
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\\n' + (m.content | trim) + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)


def draw_text(rng: random.Random, most: int = 6) -> str:
    """Words, markup, emoji, white space at the ends; sometimes nothing."""
    return "".join(rng.choices(PIECES, k=rng.randrange(most)))


def draw_record(rng: random.Random, *, features: frozenset[str]) -> tuple[Messages, Tools]:
    """A conversation with what a template can write.

    Features: `system`; `first`, the assistant begins; `users`, trained ones; `weights`, untrained
    answers; `reasoning` and `inline` thoughts; `tools`, calls and answers of tools (`wordless`:
    calls without content); `schemas` of tools.
    """
    messages: Messages = []
    if "system" in features and rng.random() < 0.3:
        messages.append({"role": "system", "content": draw_text(rng)})
    elif "first" in features and rng.random() < 0.2:
        messages.append(_draw_answer(rng, features))
    for _ in range(rng.randint(0 if messages[-1:] and "first" in features else 1, 3)):
        messages.append({"role": "user", "content": draw_text(rng)})
        if "users" in features and rng.random() < 0.1:
            messages[-1]["loss_mask"] = 1
        while "tools" in features and rng.random() < 0.3:
            messages += _draw_calls(rng, features)
        messages.append(_draw_answer(rng, features))
    if messages[-1]["role"] != "assistant":
        messages.append(_draw_answer(rng, features))
    if all(m.get("loss_mask") == 0 for m in messages if m["role"] == "assistant"):
        del messages[-1]["loss_mask"]
    function = {"name": "f", "description": draw_text(rng)}
    schemas = [{"type": "function", "function": function}]
    return messages, schemas if "schemas" in features and rng.random() < 0.7 else []


def _draw_answer(rng: random.Random, features: frozenset[str]) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": draw_text(rng)}
    if "reasoning" in features and rng.random() < 0.4:
        said["reasoning_content"] = "so " + draw_text(rng) + "."
    elif "inline" in features and rng.random() < 0.4:
        gap = rng.choice(("", "\n", "\n\n"))
        thought = rng.choice(("<think>", "<think>\n", "")) + "hm" + gap + "</think>"
        said["content"] = thought + gap + said["content"]
    if "weights" in features and rng.random() < 0.2:
        said["loss_mask"] = 0
    return said


def _draw_calls(rng: random.Random, features: frozenset[str]) -> Messages:
    """A message that calls one tool or two, and what they answer."""
    said = _draw_answer(rng, features)
    if "wordless" in features or rng.random() < 0.5:
        said["content"] = ""
    names = rng.choices(("f", "get"), k=rng.choice((1, 1, 2)))
    values = (draw_text(rng), 1, None, [draw_text(rng)])
    said["tool_calls"] = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name in names
        for arguments in [rng.choice(({}, {"x": rng.choice(values), "y": 2}))]
    ]
    return [said, *({"role": "tool", "content": draw_text(rng), "name": n} for n in names)]


def _turns(
    messages: Messages,
    head: Callable[[dict[str, Any]], str],
    said: Callable[[dict[str, Any], int], str],
    tail: str,
) -> list[Part]:
    parts: list[Part] = []
    for index, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        is_trained = message.get("loss_mask", int(is_answer)) == 1
        text = said(message, index)
        # Of others' turns the words are trained, not the white space in front of them
        lead = "" if is_answer else text[: len(text) - len(text.lstrip())]
        parts += [(head(message) + lead, False), (text[len(lead) :], is_trained), (tail, False)]
    return parts


def plain(messages: Messages, _: Tools) -> list[Part]:
    """User: ...<eos>, and so on."""
    return _turns(
        messages,
        lambda m: m["role"].capitalize() + ": ",
        lambda m, _: m["content"] + "<|endoftext|>",
        "\n",
    )


def simple_chatml(messages: Messages, _: Tools) -> list[Part]:
    """ChatML without tools and thoughts."""
    return _turns(
        messages,
        lambda m: f"<|im_start|>{m['role']}\n",
        lambda m, _: m["content"] + "<|im_end|>",
        "\n",
    )


def chatml(messages: Messages, _: Tools) -> list[Part]:
    """ChatML with tool calls, answers of tools and thoughts."""

    def said(message: dict[str, Any], _: int) -> str:
        text = message["content"]
        if message["role"] == "tool":
            return f"<tool_response>\n{text}\n</tool_response><|im_end|>"
        if thought := message.get("reasoning_content"):
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        for number, call in enumerate(message.get("tool_calls", ())):
            gap = "\n" if message["content"] or number else ""
            body = json.dumps(call["function"], ensure_ascii=False)
            text += f"{gap}<tool_call>\n{body}\n</tool_call>"
        return text + "<|im_end|>"

    def head(message: dict[str, Any]) -> str:
        role = "user" if message["role"] == "tool" else message["role"]
        return f"<|im_start|>{role}\n"

    return _turns(messages, head, said, "\n")


def llama2(messages: Messages, _: Tools) -> list[Part]:
    """[INST] question [/INST] answer <eos>."""
    parts: list[Part] = []
    system = ""
    for message in messages:
        text = message["content"]
        if message["role"] == "system":
            system = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            parts.append((f"[INST] {system}{text} [/INST]", False))
            system = ""
        else:
            parts.append((f" {text} <|endoftext|>", message.get("loss_mask", 1) == 1))
    return parts


def gpt_oss(messages: Messages, _: Tools) -> list[Part]:
    """Harmony: channels, thoughts behind the last question only, <|return|> at the very end."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    parts: list[Part] = []
    for index, message in enumerate(messages):
        text, trained = message["content"], message.get("loss_mask", 0) == 1
        if message["role"] == "tool":
            name = message["name"]
            header = f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"
            parts.append((f"{header}{text}<|end|>", False))
            continue
        if message["role"] != "assistant":
            lead = text[: len(text) - len(text.lstrip())]
            parts.append((f"<|start|>{message['role']}<|message|>{lead}", False))
            parts.append((f"{text[len(lead) :]}<|end|>", trained))
            continue
        pieces: list[str] = []
        if (thought := message.get("reasoning_content")) and index > last_user:
            pieces.append(f"<|channel|>analysis<|message|>{thought}<|end|>")
        calls = [call["function"] for call in message.get("tool_calls", ())]
        end = "<|return|>" if index == len(messages) - 1 else "<|end|>"
        if text or not calls:
            pieces.append(f"<|channel|>final<|message|>{text}{'<|end|>' if calls else end}")
        for call in calls:
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            header = f"<|channel|>commentary to=functions.{call['name']}<|message|>"
            pieces.append(f"{header}{arguments}<|call|>")
        parts.append(("<|start|>assistant", False))
        parts.append(("<|start|>assistant".join(pieces), message.get("loss_mask", 1) == 1))
    return parts


def rewriting(messages: Messages, _: Tools) -> list[Part]:
    """ChatML with a thought in the last turn only."""

    def said(message: dict[str, Any], index: int) -> str:
        text = message["content"] + "<|im_end|>"
        if message["role"] == "assistant" and index == len(messages) - 1:
            thought = message.get("reasoning_content", "")
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        return text

    return _turns(messages, lambda m: f"<|im_start|>{m['role']}\n", said, "\n")


def headers(messages: Messages, _: Tools) -> list[Part]:
    """Headers on lines of their own."""
    return _turns(
        messages,
        lambda m: f"<|im_start|>{m['role']}<|endoftext|>\n\n",
        lambda m, _: m["content"].strip() + "<|im_end|>",
        "",
    )


def renaming(messages: Messages, _: Tools) -> list[Part]:
    """The assistant is called model."""
    return _turns(
        messages,
        lambda m: f"<|im_start|>{'model' if m['role'] == 'assistant' else m['role']}\n",
        lambda m, _: m["content"].strip() + "<|im_end|>",
        "\n",
    )


SYSTEM = frozenset({"system", "weights"})
ANY = SYSTEM | {"first", "users"}
FULL = ANY | {"tools", "reasoning"}
# data.chat_template, the tokenizer's own template, the oracle, what it can write
ORACLES: tuple[tuple[str, str | None, Oracle, frozenset[str]], ...] = (
    ("plain", None, plain, ANY | {"inline"}),
    ("chatml", None, chatml, FULL),
    ("llama2", None, llama2, SYSTEM),
    ("gpt_oss", None, gpt_oss, FULL),
    ("tokenizer", CHATML_MARKED, simple_chatml, ANY | {"inline"}),
    ("tokenizer", CHATML, simple_chatml, ANY | {"inline"}),
    ("tokenizer", REWRITING, rewriting, ANY | {"reasoning"}),
    ("tokenizer", HEADERS, headers, ANY),
    ("tokenizer", RENAMING, renaming, ANY | {"inline"}),
)
