"""What cannot go together with batch-invariant mode."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.invariance_rules import INVARIANT
from omnilit.config.optimizer_rules import COMPILE
from omnilit.config.parallel_rules import CONTEXT, EXPERTS, ULYSSES
from omnilit.config.schema import Field
from omnilit.config.tensor_rules import TP
from tests.helpers.rules import problems


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({COMPILE: True}, "enable_compile: compiled code has products of its own"),
        ({TP: 2}, "tp_size: 2: ranks add up their shares of a product"),
        ({CONTEXT: 2}, "cp_size: 2: where a sample is cut depends on what it is packed with"),
        ({EXPERTS: 2}, "ep_size: 2: what a token's experts gave is added up by a sum of torch's"),
    ],
)
def test_what_computes_rows_in_another_way_is_refused(
    given: dict[str, Any], reason: str, fields: list[Field]
):
    (problem,) = problems(fields, {INVARIANT: True, **given})
    assert problem.startswith(f"{INVARIANT}: true is not possible with {reason}")
    assert not problems(fields, {INVARIANT: False, **given})


def test_ranks_that_only_share_heads_go_with_it(fields: list[Field]):
    assert not problems(fields, {INVARIANT: True, ULYSSES: 2})
