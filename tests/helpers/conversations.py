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


def draw_messages(rng: random.Random, *, features: frozenset[str]) -> list[dict[str, Any]]:
    """A conversation with what a template can write: `system`, `tools`, `reasoning`, `weights`."""
    messages: list[dict[str, Any]] = []
    if "system" in features and rng.random() < 0.3:
        messages.append({"role": "system", "content": draw_text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": draw_text(rng)})
        said: dict[str, Any] = {"role": "assistant", "content": draw_text(rng)}
        if "reasoning" in features and rng.random() < 0.4:
            said["reasoning_content"] = "so " + draw_text(rng) + "."
        if "weights" in features and rng.random() < 0.2:
            said["loss_mask"] = 0
        messages.append(said)
        if "tools" in features and rng.random() < 0.3:
            call = {"name": "f", "arguments": {"x": draw_text(rng)}}
            said["tool_calls"] = [{"type": "function", "function": call}]
            messages.append({"role": "tool", "content": draw_text(rng), "name": "f"})
            messages.append({"role": "assistant", "content": draw_text(rng)})
    if all(m.get("loss_mask") == 0 for m in messages if m["role"] == "assistant"):
        del messages[-1]["loss_mask"]
    return messages


def _turns(
    messages: list[dict[str, Any]],
    head: Callable[[dict[str, Any]], str],
    said: Callable[[dict[str, Any], int], str],
    tail: str,
) -> list[Part]:
    parts: list[Part] = []
    for index, message in enumerate(messages):
        is_trained = message["role"] == "assistant" and message.get("loss_mask", 1) == 1
        parts += [(head(message), False), (said(message, index), is_trained), (tail, False)]
    return parts


def plain(messages: list[dict[str, Any]]) -> list[Part]:
    """User: ...<eos>, and so on."""
    return _turns(
        messages,
        lambda m: m["role"].capitalize() + ": ",
        lambda m, _: m["content"] + "<|endoftext|>",
        "\n",
    )


def simple_chatml(messages: list[dict[str, Any]]) -> list[Part]:
    """ChatML without tools and thoughts."""
    return _turns(
        messages,
        lambda m: f"<|im_start|>{m['role']}\n",
        lambda m, _: m["content"] + "<|im_end|>",
        "\n",
    )


def chatml(messages: list[dict[str, Any]]) -> list[Part]:
    """ChatML with tool calls, answers of tools and thoughts."""

    def said(message: dict[str, Any], _: int) -> str:
        text = message["content"]
        if message["role"] == "tool":
            return f"<tool_response>\n{text}\n</tool_response><|im_end|>"
        if thought := message.get("reasoning_content"):
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        for call in message.get("tool_calls", ()):
            gap = "\n" if message["content"] else ""
            body = json.dumps(call["function"], ensure_ascii=False)
            text += f"{gap}<tool_call>\n{body}\n</tool_call>"
        return text + "<|im_end|>"

    def head(message: dict[str, Any]) -> str:
        role = "user" if message["role"] == "tool" else message["role"]
        return f"<|im_start|>{role}\n"

    return _turns(messages, head, said, "\n")


def llama2(messages: list[dict[str, Any]]) -> list[Part]:
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


def gpt_oss(messages: list[dict[str, Any]]) -> list[Part]:
    """Harmony: channels, thoughts behind the last question only, <|return|> at the very end."""
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    parts: list[Part] = []
    for index, message in enumerate(messages):
        text = message["content"]
        if message["role"] == "tool":
            header = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>"
            parts.append((f"{header}{text}<|end|>", False))
            continue
        if message["role"] != "assistant":
            parts.append((f"<|start|>{message['role']}<|message|>{text}<|end|>", False))
            continue
        said = ""
        if (thought := message.get("reasoning_content")) and index > last_user:
            said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
        calls = message.get("tool_calls", ())
        if text or not calls:
            said += f"<|channel|>final<|message|>{text}"
            said += "<|end|><|start|>assistant" if calls else ""
        for call in calls:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            said += f"<|channel|>commentary to=functions.f<|message|>{arguments}"
        end = "<|return|>" if index == len(messages) - 1 else "<|end|>"
        said += "<|call|>" if calls else end
        parts += [("<|start|>assistant", False), (said, message.get("loss_mask", 1) == 1)]
    return parts


def rewriting(messages: list[dict[str, Any]]) -> list[Part]:
    """ChatML with a thought in the last turn only."""

    def said(message: dict[str, Any], index: int) -> str:
        text = message["content"] + "<|im_end|>"
        if message["role"] == "assistant" and index == len(messages) - 1:
            thought = message.get("reasoning_content", "")
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        return text

    return _turns(messages, lambda m: f"<|im_start|>{m['role']}\n", said, "\n")


def headers(messages: list[dict[str, Any]]) -> list[Part]:
    """Headers on lines of their own."""
    return _turns(
        messages,
        lambda m: f"<|im_start|>{m['role']}<|endoftext|>\n\n",
        lambda m, _: m["content"].strip() + "<|im_end|>",
        "",
    )


def renaming(messages: list[dict[str, Any]]) -> list[Part]:
    """The assistant is called model."""
    return _turns(
        messages,
        lambda m: f"<|im_start|>{'model' if m['role'] == 'assistant' else m['role']}\n",
        lambda m, _: m["content"].strip() + "<|im_end|>",
        "\n",
    )


SYSTEM = frozenset({"system", "weights"})
FULL = SYSTEM | {"tools", "reasoning"}
# data.chat_template, the tokenizer's own template, the oracle, what it can write
ORACLES = (
    ("plain", None, plain, SYSTEM),
    ("chatml", None, chatml, FULL),
    ("llama2", None, llama2, SYSTEM),
    ("gpt_oss", None, gpt_oss, FULL),
    ("tokenizer", CHATML_MARKED, simple_chatml, SYSTEM),
    ("tokenizer", CHATML, simple_chatml, SYSTEM),
    ("tokenizer", REWRITING, rewriting, SYSTEM | {"reasoning"}),
    ("tokenizer", HEADERS, headers, SYSTEM),
    ("tokenizer", RENAMING, renaming, SYSTEM),
)
