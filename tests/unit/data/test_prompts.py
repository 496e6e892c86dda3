"""What of a sample is asked, and what is expected."""

from __future__ import annotations

import numpy as np
import pytest

from omnilit.data.collate import PLAIN
from omnilit.data.prompts import PromptSet, cut_prompt, take_prompts
from omnilit.types import IGNORE, Origin, Sample
from tests.helpers.samples import CountingSource


def sample_of(ids: list[int], trained: list[int], pair_start: int | None = None) -> Sample:
    tokens = np.asarray(ids, np.int32)
    labels = np.where(np.isin(tokens, trained), tokens, IGNORE).astype(np.int32)
    return Sample(tokens, labels, Origin("s", "f", 1), pair_start=pair_start)


@pytest.mark.parametrize(
    ("ids", "trained", "pair_start", "prompt", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [3, 6, 7], None, [1, 2, 3, 4, 5], (6, 7)),  # the last answer
        ([1, 2, 3, 4, 5], [3, 4], None, [1, 2], (3, 4)),  # what follows it is not expected
        ([1, 2, 3, 1, 2, 4, 4], [3, 4], 3, [1, 2], (3,)),  # a pair's chosen answer
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], None, [1, 2], (3, 4, 5)),  # a text: its first half
        ([1], [1], None, [1], ()),
        ([1, 2], [], None, [1, 2], ()),
    ],
)
def test_a_prompt_ends_where_the_last_trained_answer_begins(
    ids, trained, pair_start, prompt, expected
):
    found = cut_prompt(sample_of(ids, trained, pair_start))
    assert found.prompt.input_ids.tolist() == prompt
    assert found.expected == expected
    assert (found.prompt.labels == IGNORE).all()
    assert found.prompt.pair_start is None


def test_the_first_records_are_taken_once_each():
    class Chunks(CountingSource):
        """Of each record two samples, as of a long text."""

        def __getitem__(self, index: int) -> Sample:
            one = super().__getitem__(index)
            return Sample(one.input_ids, one.labels, Origin("s", "f", 1 + index // 2))

    samples = Chunks([6] * 6)
    assert [one.prompt.input_ids[0] for one in take_prompts(samples, 2)] == [0, 2]
    assert len(take_prompts(samples, 9)) == 3


def test_prompts_are_packed_without_labels():
    prompts = take_prompts(CountingSource([4, 6]), 2)
    batch = PromptSet(prompts, PLAIN, 64, 8).pack([one.prompt for one in prompts])
    assert batch.input_ids.tolist() == [[0, 0, 1, 1, 1]]
    assert batch.bounds == [0, 2, 5]
    assert (batch.labels == IGNORE).all()
