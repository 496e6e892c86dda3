"""Keeping transformers from a package of GPU kernels where there is no GPU.

transformers takes the functions of fla for its own wherever fla is installed, without a look at
the machine, and they raise on a CPU. It decides while a model's code is imported, once a process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Final

from typing_extensions import override

from omnilit.kernels.machine import why_absent
from omnilit.logging import get_logger

log = get_logger(__name__)
FLA: Final = "fla"


class _NotHere(MetaPathFinder):
    """Answers that there is no fla, and remembers that it was asked."""

    def __init__(self) -> None:
        self.was_asked = False

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != FLA:
            return None
        self.was_asked = True
        raise ModuleNotFoundError(f"{FLA} is kept away, since there is no GPU", name=FLA)


@contextmanager
def without_fla() -> Iterator[None]:
    """While this lasts nothing can import fla, unless there is a device that it runs on.

    Whoever builds or loads a model of transformers does so in here. Our own backend of that name
    is imported elsewhere, and asks for a GPU itself.
    """
    if not (why_absent("cuda") and why_absent("npu")):
        yield
        return
    held, finder = sys.modules.pop(FLA, None), _NotHere()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if held is not None:
            sys.modules[FLA] = held
    if finder.was_asked and find_spec(FLA) is not None:
        log.info("no GPU: transformers is kept from fla, whose kernels would raise here")
