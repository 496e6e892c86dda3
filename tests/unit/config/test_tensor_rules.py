"""What cannot go together with matrices that are split over ranks."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.config.schema import Field
from omnilit.config.tensor_rules import COMPILE, HEAD, TP
from tests.helpers.rules import problems


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({HEAD: "liger_kernel"},
         (f"{HEAD}: 'liger_kernel' needs the whole vocabulary, which tp_size splits. "
          "To fix: leave it out, or set it to chunk_loss or npu.")),
        ({HEAD: "eager"}, f"{HEAD}: 'eager' needs the whole vocabulary, which tp_size splits."),
        ({COMPILE: True},
         (f"{COMPILE}: true is not possible with tp_size: 2: torch cannot compile split matrices. "
          "To fix: set enable_compile: false, or leave tp_size out.")),
    ],
)  # fmt: skip
def test_what_needs_whole_matrices_is_refused(
    given: dict[str, Any], message: str, fields: list[Field]
):
    (problem,) = problems(fields, {TP: 2, **given})
    assert problem.startswith(message)
    assert not problems(fields, {TP: 1, **given})


def test_a_head_that_takes_a_part_of_the_vocabulary_is_good(fields: list[Field]):
    assert not problems(fields, {TP: 2, HEAD: "chunk_loss", COMPILE: False})
    assert not problems(fields, {TP: 2})
