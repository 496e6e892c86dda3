"""One raw value, from a file or the command line, as the type of its field."""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

import yaml

TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
FALSE = frozenset({"false", "f", "no", "n", "off", "0"})
NULLS = frozenset({"null", "None", "~"})


class CoercionError(ValueError):
    """A value does not fit its field.

    Args:
        problem: What is wrong, with the value.
        fix: What to write in its place.
    """

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


def coerce(value: object, annotation: Any) -> Any:
    """`value` as `annotation` wants it.

    Text that reads as a number or a truth value is taken as one, because YAML 1.1 reads `1e-5` as
    text. Annotations other than plain data are left to whoever builds the object.

    Raises:
        CoercionError: The value does not fit.
    """
    if is_interpolation(value):
        return value
    origin = get_origin(annotation) or annotation
    if origin is Union or origin is types.UnionType:
        return _coerce_union(value, annotation)
    if origin is Literal:
        return _coerce_literal(value, get_args(annotation))
    if origin is list:
        return _coerce_list(value, annotation)
    if origin is tuple:
        return _coerce_tuple(value, annotation)
    plain = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, dict: _to_dict}
    return plain[origin](value) if origin in plain else value


def is_interpolation(value: object) -> bool:
    """Whether `value` is text that OmegaConf fills in, such as `${oc.env:HOME}`."""
    return isinstance(value, str) and "${" in value


def parse_flag(words: Sequence[str], annotation: Any) -> object:
    """The words after a command line flag as a raw value, as a YAML file would hold it.

    Args:
        words: What follows the flag; none for a flag that stands alone.
        annotation: Type of the field; where it takes text, the text stays as it is. `Any`, for
            what is not known, takes YAML.

    Returns:
        A raw value for `coerce`; a single word for a list is a list of one.

    Raises:
        CoercionError: There are no words, and the field is not one of true or false.
    """
    options = _options(annotation)
    if not words:
        if {bool, Any} & set(options):
            return True
        fix = f"write {describe(annotation)} after it"
        raise CoercionError("the flag has no value", fix)
    if len(words) == 1:
        return _parse_word(words[0], options)
    lists = [option for option in options if (get_origin(option) or option) in {list, tuple}]
    element = (*(get_args(lists[0]) if lists else ()), Any)[0]
    return [_parse_word(word, _options(element)) for word in words]


def _parse_word(text: str, options: Collection[Any]) -> object:
    kinds = {get_origin(option) or option for option in options}
    takes_list = bool(kinds & {list, tuple})
    if type(None) in kinds and text in NULLS:
        return None
    is_bracketed = (takes_list and text.startswith("[")) or (dict in kinds and text[:1] == "{")
    if not is_bracketed and any(map(_takes_text, options)):
        return [text] if takes_list and str not in kinds else text
    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text  # a path with YAML's own characters is just text
    if isinstance(value, dict) and dict not in kinds and not text.startswith("{"):
        value = text  # so is a sentence with a colon
    is_single = takes_list and str not in kinds and not isinstance(value, list)
    return [value] if is_single else value


def _takes_text(annotation: Any) -> bool:
    """Whether plain text is what fits, so that YAML must not make a number of it."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in arguments)
    if (get_origin(annotation) or annotation) in {list, tuple}:
        return bool(arguments) and _takes_text(arguments[0])
    return annotation is str


def describe(annotation: Any) -> str:
    """The type of a field in a user's words, e.g. `a whole number or null`."""
    origin = get_origin(annotation) or annotation
    if origin is Union or origin is types.UnionType:
        return " or ".join(describe(option) for option in get_args(annotation))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if origin is list:
        return f"a list of {_plural((get_args(annotation) or (Any,))[0])}"
    if origin is tuple:
        return f"a list of {len(get_args(annotation))} {_plural(get_args(annotation)[0])}"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        type(None): "null",
    }
    return words.get(origin, str(annotation))


def _plural(annotation: Any) -> str:
    words: dict[Any, str] = {str: "texts", int: "whole numbers", float: "numbers"}
    return words.get(annotation, "values")


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in {Union, types.UnionType}
    return get_args(annotation) if is_union else (annotation,)


def _refuse(value: object, annotation: Any) -> CoercionError:
    wanted = describe(annotation)
    fix = f"write {wanted}"
    if annotation is str and not isinstance(value, list | dict) and value is not None:
        fix = f'put it in quotes: "{value}"'
    elif get_origin(annotation) is list and isinstance(value, str):
        fix = f"put it in brackets: [{value}]"
    return CoercionError(f"{value!r} is not {wanted}", fix)


def _coerce_union(value: object, annotation: Any) -> Any:
    options = [option for option in get_args(annotation) if option is not type(None)]
    if value is None and len(options) < len(get_args(annotation)):
        return None
    exact = [o for o in options if type(value) is (get_origin(o) or o)]
    failures: list[CoercionError] = []
    for option in [*exact, *options]:
        try:
            return coerce(value, option)
        except CoercionError as error:
            failures.append(error)
    if len(options) == 1:
        raise failures[0]
    raise _refuse(value, annotation)


def _coerce_literal(value: object, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    names = [str(choice) for choice in choices]
    near = get_close_matches(str(value), names, n=1)
    closest = f" (did you mean {near[0]!r}?)" if near else ""
    raise CoercionError(f"{value!r} is not known{closest}", f"use one of {', '.join(names)}")


def _coerce_list(value: object, annotation: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _refuse(value, annotation)
    element = (get_args(annotation) or (Any,))[0]
    return [coerce(item, element) for item in value]


def _coerce_tuple(value: object, annotation: Any) -> tuple[Any, ...]:
    elements = get_args(annotation)
    if not isinstance(value, list | tuple) or len(value) != len(elements):
        raise _refuse(value, annotation)
    return tuple(coerce(item, kind) for item, kind in zip(value, elements, strict=True))


def _to_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise _refuse(value, bool)


def _to_int(value: object) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # it may still be 1e6
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = _to_float(value)
    except CoercionError:
        raise _refuse(value, int) from None
    if not number.is_integer():
        raise _refuse(value, int)
    return int(number)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _refuse(value, float)
    try:
        number = float(value)
    except ValueError:
        raise _refuse(value, float) from None
    if not math.isfinite(number):
        raise CoercionError(f"{value!r} is not a finite number", "write a finite number")
    return number


def _to_str(value: object) -> str:
    if not isinstance(value, str):
        raise _refuse(value, str)
    return value


def _to_dict(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _refuse(value, dict)
    return dict(value)
