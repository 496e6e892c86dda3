import json
from typing import Any, Literal

import pytest

import omnilit.cli.plan  # noqa: F401 - lightning sets a variable when imported, not in a test
from omnilit.config import InferArguments, TrainingArguments
from omnilit.config.schema import Field, dataclass_fields
from omnilit.errors import ConfigError
from omnilit.tools.schema import DIALECT, INTERPOLATION, make_schema, run, type_schema


def field(path: str, annotation: Any = int, default: Any = None, *, required=False, text=""):
    return Field(path, annotation, default, required, text)


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (dict[str, str], {"type": "object"}),
        (list, {"type": "array"}),
        (list[str], {"type": "array", "items": {"type": "string"}}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (Literal["a", "b"], {"enum": ["a", "b"]}),
        (Any, {}),
    ],
)
def test_types_become_json_types(annotation, schema):
    assert type_schema(annotation) == schema


def test_tuple_has_exactly_its_items():
    schema = type_schema(tuple[float, float])
    assert schema["prefixItems"] == [{"type": "number"}, {"type": "number"}]
    assert (schema["minItems"], schema["items"]) == (2, False)


def test_groups_nest_and_refuse_unknown_keys():
    schema = make_schema([field("train.optimizer.lr", float, 0.1, text="The rate.")])
    group = schema["properties"]["train"]["properties"]["optimizer"]
    assert schema["additionalProperties"] is group["additionalProperties"] is False
    assert group["properties"] == {
        "lr": {
            "anyOf": [{"type": "number"}, dict(INTERPOLATION)],
            "default": 0.1,
            "description": "The rate.",
        }
    }


def test_text_needs_no_second_form_for_interpolations():
    schema = make_schema([field("data.train_path", str, required=True)])
    assert schema["properties"]["data"]["properties"]["train_path"] == {"type": "string"}


def test_model_may_be_a_class_with_arguments():
    plain, by_class = make_schema([field("model.strict", bool, default=True)])["properties"][
        "model"
    ]["anyOf"]
    assert list(plain["properties"]) == ["strict"]
    assert by_class["required"] == ["class_path"]
    assert list(by_class["properties"]) == ["class_path", "init_args"]


def test_trainer_is_open_and_first_field_of_a_path_counts():
    schema = make_schema([field("train.a", int, 1), field("train.a", int, 2)])
    assert "additionalProperties" not in schema["properties"]["trainer"]
    assert schema["properties"]["train"]["properties"]["a"]["default"] == 1


def test_whole_argument_tree_is_plain_json():
    fields = dataclass_fields(TrainingArguments, "train") + dataclass_fields(
        InferArguments, "infer"
    )
    schema = json.loads(json.dumps(make_schema(fields)))
    assert schema["$schema"] == DIALECT
    optimizer = schema["properties"]["train"]["properties"]["optimizer"]["properties"]
    assert optimizer["betas"]["default"] == [0.9, 0.95]
    assert "default" not in schema["properties"]["infer"]["properties"]["model_path"]


def test_every_task_is_in_the_printed_schema(capsys):
    assert run([]) == 0
    properties = json.loads(capsys.readouterr().out)["properties"]
    groups = {"imports", "model", "data", "train", "dpo_config", "infer", "trainer"}
    assert groups == set(properties)
    assert properties["imports"]["anyOf"][0] == {"type": "array", "items": {"type": "string"}}
    assert "train_path" in properties["data"]["properties"]
    assert "config_path" in properties["model"]["anyOf"][0]["properties"]


def test_arguments_are_refused():
    with pytest.raises(ConfigError, match="schema takes no arguments"):
        run(["--pretty"])


def test_help_says_how_to_use_it(capsys):
    assert run(["--help"]) == 0
    assert "omnilit schema >" in capsys.readouterr().out
