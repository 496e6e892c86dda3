"""What the benchmarks share: a tokenizer and text to make records of."""

from __future__ import annotations

import argparse
import os
import random
import resource
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from omnilit.data.template_texts import CHATML

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def read_words() -> list[str]:
    """Words of two modules of the standard library."""
    files = (random.__file__, argparse.__file__)
    return " ".join(Path(file).read_text("utf-8") for file in files).split()


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,000 tokens with a template that marks what is trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = CHATML
    return wrapped


def descendants(process: int) -> list[int]:
    """Children of a process and theirs, as far as they still run."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text(encoding="ascii").split():
            found += [int(child), *descendants(int(child))]
    return found


def cpu_seconds() -> float:
    """User and system time so far, of this process and of all that it started.

    A fork server, which is never waited for, knows the time of its own children.
    """
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both) + sum(map(_ticks, descendants(os.getpid())))


def _ticks(process: int) -> float:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
    except OSError:  # it has ended since
        return 0.0
    # behind the name, which may hold anything: utime, stime, cutime and cstime
    return sum(map(int, stat.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
