"""Tiny tokenizers, trained in a fraction of a second, for tests of any part."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "You are a helpful assistant. Answer in a few words.",
    "User: What is the capital of France? Assistant: Paris, of course!",
    "system user assistant role content think answer question",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "caf\u00e9 na\u00efve \u4f60\u597d \u4e16\u754c \U0001f600 0123456789",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# ChatML. The marked one says which characters the assistant writes.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(
    chat_template: str | None = CHATML_MARKED,
    *,
    trim_offsets: bool = False,
    has_end: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens: every text can be written and read back.

    Args:
        chat_template: Jinja source, or None for a tokenizer without one.
        trim_offsets: Leave white space out of the offsets, as some tokenizers do.
        has_end: Name `<|endoftext|>` as the end-of-text token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim_offsets
    )
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        from tokenizers.processors import ByteLevel

        tokenizer.post_processor = ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return _wrap(tokenizer, chat_template, has_end=has_end)


def build_metaspace_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A BPE that writes a space in front of every text, as those made by SentencePiece do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return _wrap(tokenizer, chat_template, has_end=True)


def _wrap(
    tokenizer: Tokenizer, chat_template: str | None, *, has_end: bool
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>" if has_end else None,
        pad_token="<|endoftext|>",
    )
    wrapped.chat_template = chat_template
    return wrapped
