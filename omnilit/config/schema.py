"""The fields of a configuration file, read off dataclasses and constructors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from docstring_parser import parse


@dataclass(frozen=True, slots=True)
class Field:
    """One value that a user can set: a leaf of the configuration file.

    Args:
        path: Where it stands, e.g. `train.optimizer.lr`.
        annotation: Its type, resolved.
        default: Its value when not given; None where `required`.
        required: True where there is no default.
        description: What it does, from the docstring.
    """

    path: str
    annotation: Any
    default: Any
    required: bool
    description: str


def dataclass_fields(cls: type, prefix: str) -> list[Field]:
    """The leaves of dataclass `cls` under the group `prefix`, nested groups walked.

    Args:
        cls: A dataclass with an `Args:` entry in its docstring for each field.
        prefix: Path of the group, e.g. `train`; empty for none.
    """
    hints, texts = get_type_hints(cls), _argument_texts(cls)
    found: list[Field] = []
    for entry in fields(cls):
        default = entry.default
        if entry.default_factory is not MISSING:
            default = entry.default_factory()
        found += _expand(
            _join(prefix, entry.name), hints[entry.name], default, texts.get(entry.name, "")
        )
    return found


def constructor_fields(
    cls: type, prefix: str, *, hidden: frozenset[str] = frozenset()
) -> list[Field]:
    """The leaves that the keyword-only parameters of `cls`'s constructor stand for.

    A constructor that forwards `**kwargs` whole to the next one takes that one's parameters too.

    Args:
        cls: A class whose docstring has an `Args:` entry for each parameter.
        prefix: Path of the group, e.g. `model`.
        hidden: Parameters that no file sets, because our own code supplies them.
    """
    found: list[Field] = []
    seen = set(hidden)
    for owner in _constructors(cls):
        init = vars(owner)["__init__"]
        hints, texts = get_type_hints(init), _argument_texts(owner)
        for name, parameter in inspect.signature(init).parameters.items():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name in seen:
                continue
            seen.add(name)
            default = MISSING if parameter.default is parameter.empty else parameter.default
            annotation = hints.get(name, Any)
            found += _expand(_join(prefix, name), annotation, default, texts.get(name, ""))
    return found


def _constructors(cls: type) -> Iterator[type]:
    """The classes whose `__init__` a call reaches: on along the MRO while `**kwargs` goes on."""
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        yield owner
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return


def _expand(path: str, annotation: Any, default: Any, text: str) -> list[Field]:
    """One field, or the leaves of the group where the annotation is a dataclass."""
    if not (isinstance(annotation, type) and is_dataclass(annotation)):
        required = default is MISSING
        return [Field(path, annotation, None if required else default, required, text)]
    return dataclass_fields(annotation, path)


def _argument_texts(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of its constructor say of each argument."""
    docs = (vars(cls).get("__doc__"), getattr(vars(cls).get("__init__"), "__doc__", None))
    params = [param for doc in docs if doc for param in parse(doc).params]
    return {p.arg_name: " ".join((p.description or "").split()) for p in params}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
