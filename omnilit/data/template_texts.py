"""The chat templates that come with omnilit, as jinja.

What the assistant says, its end token included, stands between `generation` marks.
"""

from __future__ import annotations

from typing import Final

# "User: ...<eos>\nAssistant: ...<eos>\n", the reference's own rendering for any tokenizer.
PLAIN: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

# Tools in the form of Hermes and Qwen: <tools>, <tool_call>, <tool_response>; <think> for thoughts.
CHATML: Final = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nYou may call these functions:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nWrite each call as JSON with name and arguments between <tool_call> and "
    "</tool_call>.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{% if message['reasoning_content'] %}"
    "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] }}"
    "{{ '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# [INST] question [/INST] answer </s>; the system prompt stands in the first question.
LLAMA2: Final = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if not loop.first %}{{ raise_exception('system must be the first message') }}{% endif %}"
    "{% set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ (bos_token or '') + '[INST] ' + ns.system + message['content'] + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('llama2 knows system, user and assistant only') }}{% endif %}"
    "{% endfor %}"
)

# Harmony: a header with a channel in front of each message. Thoughts go to the channel analysis,
# and only those behind the last question are kept; the last answer ends with <|return|>.
GPT_OSS: Final = (
    "{% set ns = namespace(last_user=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|start|>developer<|message|># Tools\\n\\n## functions\\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|start|>assistant' }}{% generation %}"
    "{% if message['reasoning_content'] and loop.index0 > ns.last_user %}"
    "{{ '<|channel|>analysis<|message|>' + message['reasoning_content'] + '<|end|>' }}"
    "{{ '<|start|>assistant' }}{% endif %}"
    "{% if message['content'] or not message['tool_calls'] %}"
    "{{ '<|channel|>final<|message|>' + message['content'] }}"
    "{% if message['tool_calls'] %}{{ '<|end|><|start|>assistant' }}{% endif %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<|channel|>commentary to=functions.' + call['function']['name'] + '<|message|>' }}"
    "{{ call['function']['arguments'] | tojson }}{% if not loop.last %}"
    "{{ '<|call|><|start|>assistant' }}{% endif %}{% endfor %}"
    "{% if message['tool_calls'] %}{{ '<|call|>' }}"
    "{% elif loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
    "{% endgeneration %}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|start|>functions.' + (message['name'] or 'tool') + ' to=assistant' }}"
    "{{ '<|channel|>commentary<|message|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] }}"
    "{{ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
