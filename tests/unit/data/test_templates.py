"""Which tokens are trained: checked by decoding, over generated conversations."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from omnilit.data.encode import Encoder, check_mask, decode_spans, encode_rendered
from omnilit.data.records import to_conversation
from omnilit.data.template_texts import PLAIN
from omnilit.data.templates import ChatTemplate, Rendered, select_template
from omnilit.data.transforms import ConversationTransform, TransformSettings, build_transform
from omnilit.errors import ConfigError, DataError
from omnilit.types import IGNORE, Record
from tests.helpers.tokenizers import (
    CHATML,
    CHATML_MARKED,
    build_metaspace_tokenizer,
    build_tokenizer,
)

PIECES = ("the", " ", "\n", "\n\n", "  ", "Paris", "!", "caf\u00e9", "\u4f60\u597d", "\U0001f600")
PIECES += ("def f():\n    return 1", "assistant", "User: ", "\t", "0", "'s", "fox jumps")
SAID = {"role": "assistant", "content": "a"}


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(6)))


def _conversation(rng: random.Random) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": _text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": _text(rng)})
        messages.append({"role": "assistant", "content": _text(rng)})
        if rng.random() < 0.2:
            messages[-1]["loss_mask"] = 0
    return [*messages, {"role": "user", "content": _text(rng)}, dict(SAID)]


def _transform(
    tokenizer: PreTrainedTokenizerFast, chat_template: str = "default"
) -> ConversationTransform:
    transform = build_transform(TransformSettings(chat_template=chat_template), tokenizer)
    assert isinstance(transform, ConversationTransform)
    return transform


def _trained(tokenizer: PreTrainedTokenizerFast, sample_ids: list[int]) -> str:
    text = tokenizer.decode(sample_ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("template", "name", "end"),
    [
        (CHATML_MARKED, "default", "<|im_end|>"),
        (CHATML, "tokenizer", "<|im_end|>"),
        (None, "default", "<|endoftext|>"),
        (CHATML, "plain", "<|endoftext|>"),
    ],
)
def test_the_trained_tokens_read_as_what_the_assistant_says_and_its_end_token(
    record: Callable[..., Record], template: str | None, name: str, end: str, trim_offsets: bool
):
    tokenizer = build_tokenizer(template, trim_offsets=trim_offsets)
    transform = _transform(tokenizer, name)
    rng = random.Random(1)
    conversations = [_conversation(rng) for _ in range(150)]
    batch = transform.encode([record(messages=m) for m in conversations])
    for messages, sample in zip(conversations, batch.samples, strict=True):
        said = [str(m["content"]) + end for m in messages if m["role"] == "assistant"]
        kept = [m.get("loss_mask", 1) for m in messages if m["role"] == "assistant"]
        pieces = decode_spans(sample, Encoder.of(tokenizer))
        assert [t for t, is_label in pieces if is_label] == [
            text for text, keep in zip(said, kept, strict=True) if keep
        ]
        assert _trained(tokenizer, sample.input_ids.tolist()) == "".join(t for t, _ in pieces)


def test_ids_are_those_of_plain_transformers_where_no_token_crosses_an_edge(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    messages = [{"role": "user", "content": "What is it?"}, {**SAID, "content": "Paris, 1 2"}]
    (sample,) = _transform(tokenizer).encode([record(messages=messages)]).samples
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert isinstance(theirs, Mapping)
    assert sample.input_ids.tolist() == theirs["input_ids"]
    assert (sample.labels != IGNORE).astype(int).tolist() == theirs["assistant_masks"]


def test_the_two_ways_of_finding_the_mask_agree(record: Callable[..., Record]):
    rng = random.Random(2)
    records = [record(messages=_conversation(rng)) for _ in range(50)]
    marked = _transform(build_tokenizer(CHATML_MARKED)).encode(records).samples
    differenced = _transform(build_tokenizer(CHATML)).encode(records).samples
    for a, b in zip(marked, differenced, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.labels.tolist() == b.labels.tolist()


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_a_users_turn_with_loss_mask_is_trained_without_its_header(
    record: Callable[..., Record], template: str
):
    tokenizer = build_tokenizer(template)
    messages = [{"role": "user", "content": "the fox", "loss_mask": 1}, SAID]
    (sample,) = _transform(tokenizer).encode([record(messages=messages)]).samples
    trained = [text for text, is_label in decode_spans(sample, Encoder.of(tokenizer)) if is_label]
    assert trained == ["the fox<|im_end|>", "a<|im_end|>"]


def test_plain_is_role_content_end_and_newline(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    template = select_template("plain", tokenizer)
    turns = to_conversation(record(m=[{"role": "user", "content": "q"}, SAID]), ["m"])
    text, spans, weights = template.render(turns, record())
    assert weights == [1.0]
    assert text == "User: q<|endoftext|>\nAssistant: a<|endoftext|>\n"
    assert [text[a:b] for a, b in spans] == ["a<|endoftext|>"]


def test_default_is_the_tokenizers_own_template_where_it_has_one():
    assert select_template("default", build_tokenizer(CHATML)).jinja == CHATML
    assert select_template("default", build_tokenizer(None)).jinja == PLAIN


def test_a_template_that_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match=r"'palin' is not known\. Did you mean 'plain'\?"):
        select_template("palin", build_tokenizer())
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        select_template("tokenizer", build_tokenizer(None))
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token"):
        select_template("plain", build_tokenizer(None, has_end=False))


def test_one_of_several_templates_needs_to_be_the_default():
    several = build_tokenizer(None)
    several.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(ConfigError, match="multiple chat templates with no default"):
        select_template("default", several)


def _render(template: str, record: Record, messages: list[dict[str, Any]]) -> Rendered:
    chat = ChatTemplate("tokenizer", template, {"eos_token": "</s>"}, ("</s>", "</a>"))
    turns = to_conversation(Record({"m": messages}, record.origin), ["m"])
    chat.check_header(turns, record)
    return chat.render(turns, record)


LAST_ONLY = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and loop.last %}"
    "<think></think>{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ALL_MARKED = (
    "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% endfor %}"
)
HEADER_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<a>' + m.content + '</a>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
END_UNMARKED = CHATML_MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}<|im_end|>",
)
EMPTY_MARK = CHATML_MARKED.replace("{% generation %}", "").replace(
    "{% endgeneration %}", "{% generation %}{% endgeneration %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LAST_ONLY.replace("m.content +", "(m.content if loop.last else 'x') +"), "rewrites mess"),
        (NO_END, "no end token after message 2"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation .roles must"),
        ("{{ messages | nosuch }}", "refuses the conversation"),
        (ALL_MARKED, "marks 4 spans for 2 assistant messages"),
        (EMPTY_MARK, "marks 0 spans for 2 assistant messages"),
        (END_UNMARKED, "leaves out the end token of the assistant's turn 'Paris'"),
        (HEADER_MARKED, "marks the header '<a>' as the assistant's words"),
    ],
)
def test_a_template_that_cannot_be_trusted_is_refused(
    record: Callable[..., Record], template: str, message: str
):
    user = {"role": "user", "content": "capital?"}
    messages = [user, {**SAID, "content": "Paris"}, user, {**SAID, "content": "Paris again"}]
    with pytest.raises(DataError, match=message):
        _render(template, record(), messages)


def test_reasoning_that_only_the_last_turn_shows_is_trained_in_a_single_turn(
    record: Callable[..., Record],
):
    user = {"role": "user", "content": "q"}
    rendered = _render(LAST_ONLY, record(), [user, SAID])
    assert rendered == ("user:q</s>assistant:<think></think>a</s>", [(20, 40)], [1.0])


def test_turns_that_are_rewritten_when_others_follow_are_found_in_the_whole_text(
    record: Callable[..., Record],
):
    user = {"role": "user", "content": "a"}
    text, spans, _ = _render(LAST_ONLY, record(), [user, SAID, user, {**SAID, "weight": 2}])
    assert text == "user:a</s>assistant:a</s>user:a</s>assistant:<think></think>a</s>"
    assert [text[a:b] for a, b in spans] == ["a</s>", "<think></think>a</s>"]
    assert spans[0][0] == text.index("assistant:") + len("assistant:")


def test_a_tokenizer_that_prefixes_a_space_trains_the_word_with_its_space(
    record: Callable[..., Record],
):
    tokenizer = build_metaspace_tokenizer()
    messages = [{"role": "user", "content": "the capital"}, {**SAID, "content": "Paris course"}]
    (sample,) = _transform(tokenizer).encode([record(messages=messages)]).samples
    trained = [text for text, is_label in decode_spans(sample, Encoder.of(tokenizer)) if is_label]
    assert [text.strip() for text in trained] == ["Paris course<|endoftext|>"]
    _transform(tokenizer).check(record(messages=messages))


def test_a_token_of_header_and_words_is_refused_where_the_text_cannot_be_cut(
    record: Callable[..., Record],
):
    glued = (
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% endfor %}"
    )
    tokenizer = build_metaspace_tokenizer(glued)
    tokenizer.add_tokens(["assistantParis"])
    with pytest.raises(DataError, match="'assistantParis' holds both trained and other text"):
        _transform(tokenizer).encode([record(messages=[{**SAID, "content": "Paris"}])])


def test_a_mask_that_does_not_read_as_the_words_is_refused(
    record: Callable[..., Record], tokenizer: PreTrainedTokenizerFast
):
    turns = to_conversation(record(m=[SAID]), ["m"])
    rendered = select_template("default", tokenizer).render(turns, record())
    encoder = Encoder.of(tokenizer)
    (tokens,) = encode_rendered(encoder, [rendered], [record()])
    check_mask(tokens, rendered, record(), encoder)
    tokens.is_label[0] = True
    with pytest.raises(DataError, match=r"read '.+a<.im_end.>', the text says 'a<"):
        check_mask(tokens, rendered, record(), encoder)
