"""Which prompts go on together, and when each of them ends."""

from __future__ import annotations

import pytest

from omnilit.modules.completions import Draft, choose_row
from tests.helpers.samples import CountingSource


def drafts_of(*lengths: int, limit: int = 4) -> list[Draft]:
    source = CountingSource(lengths)
    return [Draft(source[index], limit) for index in range(len(lengths))]


def test_a_row_has_room_for_what_is_complete():
    drafts = drafts_of(6, 6, 6, 6)
    assert choose_row(drafts, range(4), budget=40) == [0, 1, 2, 3]
    assert choose_row(drafts, range(4), budget=39) == [0, 1, 2]
    assert choose_row(drafts, range(1, 4, 2), budget=10) == [1]
    drafts[0].is_done = drafts[2].is_done = True
    assert choose_row(drafts, range(4), budget=20) == [1, 3]
    assert choose_row(drafts, [0, 2], budget=20) == []


def test_one_that_began_stays_in_the_row():
    drafts = drafts_of(6, 6, 6)
    assert choose_row(drafts, range(3), budget=20) == [0, 1]
    drafts[1].take(5, stop=())
    drafts[0].is_done = True
    assert choose_row(drafts, range(3), budget=20) == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "kept"), [([7, 9], [7]), ([7, 8, 7, 8], [7, 8, 7, 8]), ([9], [])]
)
def test_a_completion_ends_with_a_stop_token_or_at_its_limit(tokens, kept):
    (draft,) = drafts_of(2)
    for token in tokens:
        assert not draft.is_done
        draft.take(token, stop=(9,))
    assert draft.is_done
    assert draft.tokens == kept
    assert draft.sample().input_ids.tolist() == [0, 0, *kept]
