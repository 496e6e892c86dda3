"""Rules on batch-invariant mode: pure functions of the values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from omnilit.config.optimizer_rules import COMPILE
from omnilit.config.parallel_rules import CONTEXT, EXPERTS
from omnilit.config.tensor_rules import TP
from omnilit.config.view import View
from omnilit.errors import Problem

INVARIANT: Final = "train.enable_batch_invariant_mode"
# Axes whose ranks add up parts of one token's values, in an order that depends on the batch
SPLITS: Final[Mapping[str, str]] = MappingProxyType(
    {
        TP: "ranks add up their shares of a product",
        CONTEXT: "where a sample is cut depends on what it is packed with",
        EXPERTS: "what a token's experts gave is added up by a sum of torch's over the batch",
    }
)


def rows_stay_whole(view: View) -> list[Problem]:
    """Problems where something else decides how a row is computed."""
    return invariance_problems(
        is_on=view[INVARIANT],
        is_compiled=view[COMPILE],
        sizes={path: view[path] for path in SPLITS},
    )


def invariance_problems(
    *, is_on: bool, is_compiled: bool, sizes: Mapping[str, int]
) -> list[Problem]:
    """The same of the values alone.

    Args:
        is_on: Whether the mode is.
        is_compiled: Whether blocks are to be compiled.
        sizes: Of the axes of `SPLITS`, by path.
    """
    if not is_on:
        return []
    problems = []
    if is_compiled:
        problem = "true is not possible with enable_compile: compiled code has products of its own"
        problems.append(Problem(INVARIANT, problem, "set enable_compile: false"))
    for path, size in sizes.items():
        if size != 1:
            name = path.rpartition(".")[2]
            problem = f"true is not possible with {name}: {size}: {SPLITS[path]}"
            problems.append(Problem(INVARIANT, problem, f"leave {name} out"))
    return problems
