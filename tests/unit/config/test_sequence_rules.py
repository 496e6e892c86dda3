"""How sequences may be split, judged before they are."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.parallel_rules import ATTENTION, CONTEXT, METHOD, ULYSSES
from omnilit.config.schema import Field
from tests.helpers.rules import problems


@pytest.mark.parametrize(
    "given",
    [
        {METHOD: "gather"},
        {METHOD: "ring", CONTEXT: 2},
        {METHOD: "gather", CONTEXT: 4},
        {METHOD: "ring", CONTEXT: 2, ULYSSES: 2},
        {CONTEXT: 2, ATTENTION: "eager"},
        {METHOD: "ring", CONTEXT: 2, ATTENTION: "flash_attention_2"},  # its default
    ],
)
def test_a_method_that_has_an_effect_is_good(given: dict[str, Any], fields: list[Field]):
    assert not problems(fields, given, world_size=4)


@pytest.mark.parametrize("given", [{}, {ULYSSES: 4}])
def test_a_ring_of_one_rank_is_an_error(given: dict[str, Any], fields: list[Field]):
    assert problems(fields, {METHOD: "ring", **given}, world_size=4) == [
        (f"{METHOD}: ring has no effect, because cp_size is 1. To fix: leave it out, or set "
         "cp_size above 1.")
    ]  # fmt: skip


def test_a_ring_goes_past_the_kernel_of_attention(fields: list[Field]):
    assert problems(fields, {METHOD: "ring", CONTEXT: 2, ATTENTION: "eager"}, world_size=4) == [
        (f"{ATTENTION}: eager has no effect, because cp_method: ring attends by code of its own. "
         "To fix: leave it out, or set cp_method: gather.")
    ]  # fmt: skip
