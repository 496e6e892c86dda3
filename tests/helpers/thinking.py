"""Templates that rewrite what is past, and what each should write, in plain string code.

What stands here has the ways of published templates of reasoning models and of tools, not their
texts.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.helpers.conversations import SYSTEM, Messages, Oracle, Part, Tools
from tests.helpers.tokenizers import build_tokenizer

SPECIAL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]
# Tokens of their own that are not special, as in published tokenizers
WITHIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
WITHIN += ["<think>", "</think>"]

# The number of the last question
ASKED = (
    "{% set ns = namespace(asked=-1, final=-1, called='', thought='', words='') %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% elif m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
# Needs a first message
SCHEMAS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
)
CALLS = "{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}"
# Answers of tools, those that follow each other in one message of the user's
RESULTS = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)
# Takes thoughts out of the content, and shows them behind the last question only
THINKING = (
    f"{ASKED}{SCHEMAS}{{% for m in messages %}}{{% if m.role == 'assistant' %}}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% set ns.thought = m.reasoning_content or '' %}{% set ns.words = m.content %}"
    "{% if not m.reasoning_content and '</think>' in m.content %}"
    "{% set ns.thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set ns.words = m.content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.asked and (loop.last or ns.thought) %}"
    "{{ '<think>\\n' + ns.thought + '\\n</think>\\n\\n' + ns.words.lstrip('\\n') }}"
    "{% else %}{{ ns.words }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if ns.words or not loop.first %}{{ '\\n' }}{% endif %}"
    f"{CALLS}{{% endfor %}}{{{{ '<|im_end|>\\n' }}}}"
    f"{{% elif m.role == 'tool' %}}{RESULTS}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same for a model that always thinks
OPENING = THINKING.replace(
    "add_generation_prompt %}{{ '<|im_start|>assistant\\n'",
    "add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n'",
)
# Never shows a thought, and opens one in the prompt; the system's words stand in front
STRIPPING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|message|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|message|><think>\\n' }}{% endif %}"
)
# Marks what is said, without the thoughts of earlier turns
STRIPPING_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Channels; thoughts until a final answer follows; answers of tools are headed by the call's name;
# a token of its own ends the last turn
CHANNELS = (
    f"{ASKED}{{% for m in messages %}}{{% if m.role == 'assistant' %}}"
    "{{ '<|start|>assistant' }}"
    "{% if m.reasoning_content and loop.index0 > ns.asked and loop.index0 >= ns.final %}"
    "{{ '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}"
    "{% endif %}{% if m.tool_calls %}"
    "{% if m.content %}"
    "{{ '<|channel|>commentary<|message|>' + m.content + '<|end|><|start|>assistant' }}{% endif %}"
    "{% for call in m.tool_calls %}{% set ns.called = call.function.name %}"
    "{{ ' to=' + ns.called + '<|message|>' + (call.function.arguments | tojson) + '<|call|>' }}"
    "{% if not loop.last %}{{ '<|start|>assistant' }}{% endif %}{% endfor %}"
    "{% else %}{{ '<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|start|>' + ns.called + ' to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# No generation prompt, and tools in front of the last question, wherever that is
INSTRUCT = (
    f"{ASKED}{{% for m in messages %}}{{% if m.role == 'user' %}}"
    "{% if tools and loop.index0 == ns.asked %}{{ '[TOOLS] ' + (tools | tojson) + '[/TOOLS]' }}"
    "{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[RESULTS] ' + m.content + '[/RESULTS]' }}"
    "{% elif m.tool_calls %}"
    "{{ '[CALLS] ' + (m.tool_calls | map(attribute='function') | list | tojson) + eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# A system prompt of its own, and no line for the content of a message that only calls
DEMANDING = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    "{% endif %}{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\\n' + m.content }}{% endif %}"
    f"{{% for call in m.tool_calls %}}{{{{ '\\n' }}}}{CALLS}{{% endfor %}}{{{{ '<|im_end|>\\n' }}}}"
    f"{{% elif m.role == 'tool' %}}{RESULTS}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_thinking_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens that these templates write."""
    tokenizer = build_tokenizer(chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.backend_tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in WITHIN]
    )
    return tokenizer


def _is_trained(message: dict[str, Any]) -> bool:
    return message.get("loss_mask", int(message["role"] == "assistant")) == 1


def _asked(messages: Messages) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls(message: dict[str, Any]) -> list[str]:
    calls = message.get("tool_calls", ())
    return [f"<tool_call>\n{_dump(call['function'])}\n</tool_call>" for call in calls]


def _results(messages: Messages, index: int) -> list[Part]:
    """A tool's answer between the ends of the user's message that holds it."""
    is_first = index == 0 or messages[index - 1]["role"] != "tool"
    is_last = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
    text = f"\n<tool_response>\n{messages[index]['content']}\n</tool_response>"
    before, behind = "<|im_start|>user" * is_first, "<|im_end|>\n" * is_last
    return [(before + text + behind, False)]


def _open(head: str, said: str, *, is_trained: bool) -> list[Part]:
    """A turn behind a prompt that opens a thought: what the two share is not trained."""
    shared = next((tag for tag in ("<think>\n", "<think>") if said.startswith(tag)), "")
    return [(head + shared, False), (said[len(shared) :], is_trained)]


def _said_thinking(messages: Messages, index: int) -> str:
    message, words = messages[index], messages[index]["content"]
    thought = message.get("reasoning_content", "")
    if not thought and "</think>" in words:
        before, *_, words = words.split("</think>")
        thought, words = before.split("<think>")[-1].strip("\n"), words.lstrip("\n")
    calls = _calls(message)
    body = "\n".join([words, *calls] if words else calls)
    is_last = index + 1 == len(messages)
    if index > _asked(messages) and (is_last or thought):
        cut = body[len(words) - len(words.lstrip("\n")) :]
        body = f"<think>\n{thought}\n</think>\n\n{cut}"
    return body + "<|im_end|>"


def _write_thinking(messages: Messages, tools: Tools, *, is_opened: bool) -> list[Part]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    schemas = "".join(_dump(tool) + "\n" for tool in tools)
    lead = system or ""
    if tools and system is not None:
        lead += "\n\n"
    parts: list[Part] = []
    if tools or system is not None:
        parts.append((f"<|im_start|>system\n{lead}{schemas}<|im_end|>\n", False))
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            parts += _results(messages, index)
        elif message["role"] == "user":
            parts.append((f"<|im_start|>user\n{message['content']}<|im_end|>\n", False))
        elif message["role"] == "assistant":
            said, trained = _said_thinking(messages, index), _is_trained(message)
            head = "<|im_start|>assistant\n"
            opened = _open(head, said, is_trained=trained)
            parts += opened if is_opened else [(head, False), (said, trained)]
            parts.append(("\n", False))
    return parts


def thinking(messages: Messages, tools: Tools) -> list[Part]:
    """Thoughts behind the last question."""
    return _write_thinking(messages, tools, is_opened=False)


def opening(messages: Messages, tools: Tools) -> list[Part]:
    """The same; the prompt opens a thought."""
    return _write_thinking(messages, tools, is_opened=True)


def stripping(messages: Messages, _: Tools) -> list[Part]:
    """No thoughts; the prompt opens one."""
    parts: list[Part] = [(m["content"], False) for m in messages if m["role"] == "system"]
    for message in messages:
        if message["role"] == "user":
            parts.append((f"<|start|>{message['content']}", False))
        elif message["role"] == "assistant":
            said = message["content"].split("</think>")[-1] + "<|end|>"
            parts += _open("<|message|>", said, is_trained=_is_trained(message))
    return parts


def stripping_marked(messages: Messages, _: Tools) -> list[Part]:
    """No thoughts before the last turn."""
    parts: list[Part] = []
    for index, message in enumerate(messages):
        text = message["content"]
        if message["role"] == "assistant" and index + 1 < len(messages):
            text = text.split("</think>")[-1]
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts += [(f"{text}<|im_end|>", _is_trained(message)), ("\n", False)]
    return parts


def channels(messages: Messages, _: Tools) -> list[Part]:
    """Thoughts until a final answer follows."""
    said = [m["role"] == "assistant" and not m.get("tool_calls") for m in messages]
    final = max((i for i, is_final in enumerate(said) if is_final), default=-1)
    parts: list[Part] = []
    called = ""
    for index, message in enumerate(messages):
        words = message["content"]
        if message["role"] == "tool":
            head = f"<|start|>{called} to=assistant<|message|>"
            parts.append((f"{head}{_dump(words)}<|end|>", False))
            continue
        if message["role"] != "assistant":
            parts.append((f"<|start|>{message['role']}<|message|>{words}<|end|>", False))
            continue
        pieces: list[str] = []
        thought = message.get("reasoning_content")
        if thought and index > _asked(messages) and index >= final:
            pieces.append(f"<|channel|>analysis<|message|>{thought}<|end|>")
        calls = [call["function"] for call in message.get("tool_calls", ())]
        if calls and words:
            pieces.append(f"<|channel|>commentary<|message|>{words}<|end|>")
        for call in calls:
            called = call["name"]
            pieces.append(f" to={called}<|message|>{_dump(call['arguments'])}<|call|>")
        if not calls:
            end = "<|return|>" if index + 1 == len(messages) else "<|end|>"
            pieces.append(f"<|channel|>final<|message|>{words}{end}")
        parts.append(("<|start|>assistant", False))
        parts.append(("<|start|>assistant".join(pieces), _is_trained(message)))
    return parts


def instruct(messages: Messages, tools: Tools) -> list[Part]:
    """No header; tools in front of the last question."""
    parts: list[Part] = []
    for index, message in enumerate(messages):
        words, calls = message["content"], message.get("tool_calls", ())
        if message["role"] == "user":
            shown = f"[TOOLS] {_dump(tools)}[/TOOLS]" if tools and index == _asked(messages) else ""
            parts.append((f"{shown}[INST] {words}[/INST]", False))
        elif message["role"] == "tool":
            parts.append((f"[RESULTS] {words}[/RESULTS]", False))
        else:
            called = f"[CALLS] {_dump([call['function'] for call in calls])}"
            said = called if calls else f" {words}"
            parts.append((f"{said}<|endoftext|>", _is_trained(message)))
    return parts


def demanding(messages: Messages, tools: Tools) -> list[Part]:
    """ChatML with a system prompt of its own."""
    parts: list[Part] = []
    if messages[0]["role"] != "system":
        parts.append(("<|im_start|>system\nBe kind.<|im_end|>\n", False))
    if tools:
        parts.append((f"<|im_start|>tools\n{_dump(tools)}<|im_end|>\n", False))
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            parts += _results(messages, index)
            continue
        words, calls = message["content"], _calls(message)
        body = "\n".join([words, *calls] if words or not calls else calls)
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts += [(f"{body}<|im_end|>", _is_trained(message)), ("\n", False)]
    return parts


CALLING = SYSTEM | {"tools", "schemas", "first"}
REWRITERS: tuple[tuple[str, str | None, Oracle, frozenset[str]], ...] = (
    ("tokenizer", THINKING, thinking, CALLING | {"reasoning", "inline"}),
    ("tokenizer", OPENING, opening, CALLING | {"reasoning", "inline"}),
    ("tokenizer", STRIPPING, stripping, SYSTEM | {"inline", "first"}),
    ("tokenizer", STRIPPING_MARKED, stripping_marked, SYSTEM | {"inline", "first"}),
    ("tokenizer", CHANNELS, channels, SYSTEM | {"tools", "reasoning", "first"}),
    ("tokenizer", INSTRUCT, instruct, frozenset({"weights", "tools", "schemas", "wordless"})),
    ("tokenizer", DEMANDING, demanding, CALLING),
)
