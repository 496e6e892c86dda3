from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest

from omnilit.config.schema import Field
from omnilit.config.status import TOPICS, FieldStatus, load_status, refuse_later
from omnilit.config.view import View

RESTRICTED = [path for path, row in load_status().items() if row.issue]


def _candidates(annotation: Any) -> list[Any]:
    options = [o for o in get_args(annotation) if o is not type(None)]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in {list, dict}:
        return [get_origin(annotation)("x") if get_origin(annotation) is list else {"x": "y"}]
    if options:
        return [value for option in options for value in _candidates(option)]
    others = {bool: [True, False], int: [3, 4], float: [0.5, 0.25], str: ["other"]}
    return others.get(annotation, [{"x": "y"}])


@pytest.mark.parametrize("path", RESTRICTED)
def test_every_value_that_is_not_there_yet_is_refused_with_what_brings_it(
    path: str, fields: list[Field]
):
    known = {field.path: field for field in fields}
    row = load_status()[path]
    field = known[path]
    for value in [field.default, *(row.legal or ())]:
        assert not refuse_later(View(known, {path: value}), load_status())
    illegal = [
        value
        for value in _candidates(field.annotation)
        if value != field.default and value not in (row.legal or ())
    ]
    if path == "data.dataloader.drop_last":
        assert not illegal, "a rule on several fields refuses it"
        return
    assert illegal, f"no other value of {path} is tried"
    for value in illegal:
        (problem,) = refuse_later(View(known, {path: value}), load_status())
        assert problem.key == path
        assert problem.problem.endswith(
            f"is not available yet: it comes with a later release ({TOPICS[str(row.issue)]})"
        )
        assert problem.fix.startswith("leave it out or set it to its default, ")


def test_the_refusal_shows_the_value_the_default_and_what_is_legal(fields: list[Field]):
    known = {field.path: field for field in fields}
    given = {"data.data_type": "diffusion", "model.encode_target": True}
    problems = refuse_later(View(known, given), load_status())
    assert [str(problem) for problem in problems] == [
        (
            "data.data_type: diffusion is not available yet: it comes with a later release "
            "(diffusion). To fix: leave it out or set it to its default, conversation, or use "
            "plaintext or classification or dpo."
        ),
        (
            "model.encode_target: true is not available yet: it comes with a later release "
            "(diffusion). To fix: leave it out or set it to its default, false."
        ),
    ]


def test_available_fields_take_any_value(fields: list[Field]):
    known = {field.path: field for field in fields}
    given = {"train.optimizer.lr": 1.0, "train.seed": 7, "infer.top_p": 0.5}
    assert not refuse_later(View(known, given), load_status())


def test_fields_without_a_row_are_left_to_their_owner():
    known = {"model.own": Field("model.own", int, 1, False, "")}
    assert not refuse_later(View(known, {"model.own": 2}), load_status())


def test_legal_values_are_read_as_a_tuple():
    assert load_status()["data.data_type"].legal == (
        *("conversation", "plaintext", "classification", "dpo"),
    )
    assert load_status()["train.seed"] == FieldStatus("available")
