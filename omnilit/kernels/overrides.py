"""Operators of torch that a run replaces by its own, for the time of the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch.library import Library

DispatchKey = Literal["CPU", "CUDA", "PrivateUse1"]  # Ascend's is the last


def replace_operators(
    operators: Mapping[str, Callable[..., Any]], key: DispatchKey
) -> Callable[[], None]:
    """Have torch run other code for some operators, below autograd, in this whole process.

    What replaces an operator must not call it: not even for dtypes that it leaves alone, since
    the code it replaces is out of reach. The form with `out=` is an operator of its own.
    Compiled code goes past the dispatcher and so past this.

    Args:
        operators: By name in `aten`, with the overload where it has one: `mm`, `mean.dim`.
        key: The device whose tensors it is for.

    Returns:
        A function that puts torch's own back; calling it again does nothing.
    """
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch says that an operator is replaced: it is meant to be
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, kernel in operators.items():
            library.impl(name, kernel, key)
    return library._destroy  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - its only end
