"""Held-out prompts: the evaluation data up to what a model is to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from omnilit.data.batches import SampleSource
from omnilit.data.collate import CollateSettings, make_batch
from omnilit.data.labels import label_spans
from omnilit.types import IGNORE, MicroBatch, Sample


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """The beginning of a sample, and how it goes on in the data.

    Args:
        prompt: Without labels; at least one token.
        expected: The tokens that follow there.
    """

    prompt: Sample
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts, and how they are packed.

    Args:
        prompts: In the order of the data.
        settings: What a micro-batch of them holds.
        budget: Tokens of a micro-batch.
        max_seq_len: Tokens that a prompt and what follows it may have together.
    """

    prompts: tuple[HeldOutPrompt, ...]
    settings: CollateSettings
    budget: int
    max_seq_len: int

    def pack(self, samples: Sequence[Sample]) -> MicroBatch:
        """A micro-batch of sequences without labels; a filler of none."""
        return make_batch(samples, self.settings)


def take_prompts(samples: SampleSource, number: int) -> tuple[HeldOutPrompt, ...]:
    """The prompts of the first records, one a record.

    Args:
        samples: Prepared data.
        number: How many, where there are as many records.
    """
    found: dict[tuple[str, int], HeldOutPrompt] = {}
    for index in range(len(samples.lengths)):
        if len(found) == number:
            break
        sample = samples[index]
        found.setdefault(sample.origin[1:], cut_prompt(sample))  # a long text is several samples
    return tuple(islice(found.values(), number))


def cut_prompt(sample: Sample) -> HeldOutPrompt:
    """A sample up to the last answer that is trained; half of one that is trained whole.

    Of a preference pair it is the chosen one.
    """
    end = len(sample) if sample.pair_start is None else sample.pair_start
    spans = label_spans(sample.labels[:end])
    start, stop = spans[-1] if spans else (end, end)
    start = start or max(end // 2, 1)
    prompt = sequence_of(sample, sample.input_ids[:start].tolist())
    return HeldOutPrompt(prompt, tuple(sample.input_ids[start:stop].tolist()))


def sequence_of(sample: Sample, tokens: Sequence[int]) -> Sample:
    """A sample of one sequence without labels, of the same record."""
    ids = np.asarray(tokens, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    return replace(sample, input_ids=ids, labels=labels, weights=None, pair_start=None)
