from __future__ import annotations

from typing import Any, Literal

import pytest

from omnilit.config.coerce import CoercionError, coerce, describe, parse_flag

Mode = Literal["ddp", "fsdp2"]


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, bool, True),
        ("Yes", bool, True),
        ("off", bool, False),
        ("0", bool, False),
        (3, int, 3),
        (1e6, int, 1_000_000),
        ("1e6", int, 1_000_000),
        ("10_000_000", int, 10_000_000),
        ("12345678901234567890", int, 12345678901234567890),
        (3, float, 3.0),
        ("1e-5", float, 1e-5),
        ("text", str, "text"),
        (None, str | None, None),
        ("4", int | None, 4),
        (["a", "b"], list[str], ["a", "b"]),
        ([], list[str] | None, []),
        (["a"], str | list[str], ["a"]),
        ("a", str | list[str] | None, "a"),
        ([0.9, "0.95"], tuple[float, float], (0.9, 0.95)),
        ({"a": 1}, dict, {"a": 1}),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ("ddp", Mode, "ddp"),
        ("${oc.env:LR}", float, "${oc.env:LR}"),
    ],
)
def test_values_become_what_their_field_wants(value: Any, annotation: Any, expected: Any):
    result = coerce(value, annotation)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "problem", "fix"),
    [
        (1, bool, "1 is not true or false", "write true or false"),
        ("maybe", bool, "'maybe' is not true or false", "write true or false"),
        (True, int, "True is not a whole number", "write a whole number"),
        (1.5, int, "1.5 is not a whole number", "write a whole number"),
        ("many", int, "'many' is not a whole number", "write a whole number"),
        ("many", int | None, "'many' is not a whole number", "write a whole number"),
        (True, float, "True is not a number", "write a number"),
        (float("nan"), float, "nan is not a finite number", "write a finite number"),
        ("inf", float, "'inf' is not a finite number", "write a finite number"),
        (float("inf"), int, "inf is not a whole number", "write a whole number"),
        (7, str, "7 is not text", 'put it in quotes: "7"'),
        (None, str, "None is not text", "write text"),
        ({"a": 1}, str, "{'a': 1} is not text", "write text"),
        ("bias", list[str], "'bias' is not a list of texts", "put it in brackets: [bias]"),
        ([1], list[str], "1 is not text", 'put it in quotes: "1"'),
        (3, str | list[str], "3 is not text or a list of texts", "write text or a list of texts"),
        ([0.9], tuple[float, float], "[0.9] is not a list of 2 numbers", "write a list of 2 numb"),
        ("a", dict, "'a' is not a mapping", "write a mapping"),
        ("fsdp", Mode, "'fsdp' is not known (did you mean 'fsdp2'?)", "use one of ddp, fsdp2"),
        (5, Mode, "5 is not known", "use one of ddp, fsdp2"),
    ],
)
def test_wrong_values_are_refused_with_what_to_write(
    value: Any, annotation: Any, problem: str, fix: str
):
    with pytest.raises(CoercionError) as caught:
        coerce(value, annotation)
    assert caught.value.problem == problem
    assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("1e-5", float, 1e-5),
        ("8", int | None, 8),
        ("null", int | None, None),
        ("null", str, "null"),
        ("123", str | None, "123"),
        ("yes", bool, True),
        ("bias", list[str], ["bias"]),
        ("[bias, norm]", list[str], ["bias", "norm"]),
        ("[a: b", list[str], ["[a: b"]),
        ("[a, b]", str | list[str], ["a", "b"]),
        ("a", str | list[str], "a"),
        ("[0.9, 0.99]", tuple[float, float], (0.9, 0.99)),
        ("{image: 3}", dict, {"image": 3}),
        ("ddp", Mode, "ddp"),
        ("2", Literal[1, 2], 2),
        ("no", Literal["no", "yes"], "no"),
        ("[1, 2]", Any, [1, 2]),
        ("12", list[str], ["12"]),
        ("12", list[int], [12]),
        ("[a, b", str | list[str], "[a, b"),
        ("${oc.env:X}", int, "${oc.env:X}"),
        ("${oc.env:X}", list[str], ["${oc.env:X}"]),
    ],
)
def test_the_text_of_a_flag_becomes_the_same_as_in_a_file(
    text: str, annotation: Any, expected: Any
):
    assert coerce(parse_flag([text], annotation), annotation) == expected


def test_several_words_are_a_list_and_none_is_true_or_missing():
    assert parse_flag(["a", "2"], list[str]) == ["a", "2"]
    assert coerce(parse_flag(["0.9", "0.99"], tuple[float, float]), tuple[float, float]) == (
        0.9,
        0.99,
    )
    assert parse_flag([], bool) is True
    assert parse_flag([], bool | None) is True
    assert parse_flag([], Any) is True
    for annotation in (int, str | None, list[str]):
        with pytest.raises(CoercionError, match="the flag has no value") as caught:
            parse_flag([], annotation)
        assert caught.value.fix == f"write {describe(annotation)} after it"


def test_types_are_described_in_a_users_words():
    assert describe(int | None) == "a whole number or null"
    assert describe(Mode) == "one of ddp, fsdp2"
    assert describe(list) == "a list of values"
