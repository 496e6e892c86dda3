"""Forwards of single module instances whose global names mean something else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType

from torch import nn


def own_forward(module: nn.Module) -> FunctionType:
    """The forward as the module's class wrote it, without decorators."""
    forward = inspect.unwrap(type(module).forward)
    assert isinstance(forward, FunctionType)
    return forward


def copy_space(forward: FunctionType, names: Mapping[str, object], number: int) -> ModuleType:
    """A module like the one `forward` was written in, with other values for `names`.

    It stands in `sys.modules` under a name of its own: torch.compile guards on globals through
    the module that they say they belong to.

    Args:
        forward: From `own_forward`.
        names: What the copy has instead.
        number: Makes its name its own.
    """
    space = ModuleType(f"{forward.__globals__['__name__']}__omnilit_{number:x}")
    vars(space).update({**forward.__globals__, "__name__": space.__name__, **names})
    sys.modules[space.__name__] = space
    return space


def rebuild_forward(module: nn.Module, space: ModuleType) -> None:
    """Give one instance a copy of its class's forward whose globals are those of `space`."""
    forward = own_forward(module)
    copy = FunctionType(
        forward.__code__,
        vars(space),
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__, copy.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    module.forward = MethodType(copy, module)
