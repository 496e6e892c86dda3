"""Rules on matrices that are split over ranks: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.optimizer_rules import COMPILE
from omnilit.config.parallel_sizes import ACCELERATOR
from omnilit.config.view import View
from omnilit.errors import Problem

TP: Final = f"{ACCELERATOR}.tp_size"
HEAD: Final = "model.ops_implementation.cross_entropy_loss_implementation"
# Kernels of the head's loss that can do with a part of the vocabulary
SPLIT_HEADS: Final = ("chunk_loss", "npu")
NEEDS_ALL: Final = "needs the whole vocabulary, which tp_size splits"


def head_takes_a_part(view: View) -> list[Problem]:
    """A problem where a kernel was given that wants all rows of the head."""
    backend = view[HEAD]
    if view[TP] == 1 or not view.is_given(HEAD) or backend in (None, *SPLIT_HEADS):
        return []
    return [whole_head(backend)]


def whole_head(backend: str) -> Problem:
    """What is wrong with a kernel of that name, which was given."""
    fix = f"leave it out, or set it to {' or '.join(SPLIT_HEADS)}"
    return Problem(HEAD, f"{backend!r} {NEEDS_ALL}", fix)


def compiled_blocks_are_whole(view: View) -> list[Problem]:
    """A problem where blocks are to be compiled whose matrices are split."""
    return compile_problems(tp_size=view[TP], is_compiled=view[COMPILE])


def compile_problems(*, tp_size: int, is_compiled: bool) -> list[Problem]:
    """The same of the values alone."""
    if tp_size == 1 or not is_compiled:
        return []
    problem = f"true is not possible with tp_size: {tp_size}: torch cannot compile split matrices"
    return [Problem(COMPILE, problem, "set enable_compile: false, or leave tp_size out")]
