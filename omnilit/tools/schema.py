"""`omnilit schema`: a JSON Schema of the YAML, so that editors complete and check it."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Union, get_args, get_origin

from omnilit.config.schema import Field
from omnilit.errors import ConfigError

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
INTERPOLATION: Final[Mapping[str, str]] = {"type": "string", "pattern": r"\$\{.+\}"}
# What Lightning checks itself
OPEN_GROUPS: Final[Mapping[str, Mapping[str, Any]]] = {
    "trainer": {
        "type": "object",
        "description": "Arguments of Lightning's Trainer: accelerator, devices, num_nodes, ...",
    },
}
Schema = dict[str, Any]


def run(argv: Sequence[str]) -> int:
    """Print the schema; returns the exit code.

    Raises:
        ConfigError: An argument was given; there is none.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write("usage: omnilit schema > omnilit.schema.json\n")
        return 0
    if argv:
        raise ConfigError(key=argv[0], problem="schema takes no arguments", fix="leave it out")
    sys.stdout.write(json.dumps(make_schema(all_fields()), indent=2) + "\n")
    return 0


def all_fields() -> list[Field]:
    """The fields of every task; what several tasks share comes several times."""
    from omnilit.cli.plan import task_fields  # these import lightning, which --help can spare
    from omnilit.cli.tasks import TASKS, load_task

    return [field for name in TASKS for field in task_fields(load_task(name))]


def make_schema(fields: Iterable[Field]) -> Schema:
    """The schema of a file with these fields, of which none is required.

    A file may leave out what flags give, so nothing is required. Keys that are in no field are
    refused; `model` may also name a class with `class_path` and `init_args`.

    Args:
        fields: Of all groups and tasks; the first of a path counts.
    """
    root = _object("Configuration of omnilit.")
    for field in fields:
        *groups, leaf = field.path.split(".")
        node = root
        for group in groups:
            node = node["properties"].setdefault(group, _object(""))
        node["properties"].setdefault(leaf, _leaf(field))
    _allow_class(root)
    root["properties"].update({name: dict(body) for name, body in OPEN_GROUPS.items()})
    return {"$schema": DIALECT, "title": "omnilit", **root}


def type_schema(annotation: Any) -> Schema:
    """What a value of this type looks like in YAML.

    What is no plain data gets an empty schema: whoever builds the object checks it.
    """
    origin = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    if origin is Union or origin is types.UnionType:
        return {"anyOf": [type_schema(option) for option in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": type_schema(arguments[0])} if arguments else _ARRAY
    if origin is tuple:
        items = [type_schema(item) for item in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in _NAMES:
        return {"type": _NAMES[origin]}
    return {}


_ARRAY: Final[Schema] = {"type": "array"}
_NAMES: Final[Mapping[Any, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    type(None): "null",
}


def _object(description: str) -> Schema:
    text = {"description": description} if description else {}
    return {"type": "object", **text, "properties": {}, "additionalProperties": False}


def _leaf(field: Field) -> Schema:
    """One value; where it is no text, an interpolation such as `${oc.env:NAME}` will do too."""
    body: Schema = type_schema(field.annotation)
    options = body.get("anyOf", [body])
    if body and {"type": "string"} not in options:
        body = {"anyOf": [*options, dict(INTERPOLATION)]}
    if field.description:
        body["description"] = field.description
    if not field.required:
        body["default"] = _plain(field.default)
    return body


def _plain(default: object) -> Any:
    """A default as YAML would show it."""
    return list(default) if isinstance(default, tuple) else default


def _allow_class(root: Schema) -> None:
    """Let `model` be a class with arguments, which may be one that we do not know."""
    plain = root["properties"].get("model")
    if plain is None:
        return
    by_class = _object("A task by its class.")
    by_class["properties"] = {
        "class_path": {"type": "string", "description": "A task of omnilit, or your own class."},
        "init_args": {"type": "object", "description": "Arguments of its constructor."},
    }
    by_class["required"] = ["class_path"]
    root["properties"]["model"] = {"anyOf": [plain, by_class]}
