"""The fields of the reference, as the checks take them."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Optional

import pytest

from omnilit.config import (
    DPOConfig,
    InferArguments,
    LoraArguments,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.config.data import DataloaderConfig
from omnilit.config.schema import Field, constructor_fields, dataclass_fields

REFERENCE = Path(__file__).parents[2] / "data" / "reference_fields.json"
NAMES = {"Optional": Optional, "Literal": Literal, "List": list, "Dict": dict, "Any": Any}


def _read_type(text: str) -> Any:
    if re.match(r'"\w+" \| ', text):  # the reference writes two of its literals bare
        text = f"Literal[{text.replace(' | ', ', ')}]"
    text = "Optional[str]" if text == "Optional[Literal[...]]" else text
    types = {"str": str, "int": int, "float": float, "bool": bool}
    return eval(text, {"__builtins__": {}}, NAMES | types)


@pytest.fixture(scope="session")
def reference() -> dict[str, Field]:
    """Every row of the argument reference."""
    rows = json.loads(REFERENCE.read_text(encoding="utf-8"))
    return {
        row["path"]: Field(
            row["path"], _read_type(row["type"]), row["default"], row["required"], ""
        )
        for row in rows
    }


@pytest.fixture(scope="session")
def modules() -> ModuleType:
    """The package of the tasks; its imports set variables, so they come before any test."""
    return import_module("omnilit.modules")


@pytest.fixture(scope="session")
def own_fields() -> dict[str, Field]:
    """The leaves of the argument tree's dataclasses."""
    groups = {
        "model.ops_implementation": OpsImplementationConfig,
        "model.lora": LoraArguments,
        "data.dataloader": DataloaderConfig,
        "train": TrainingArguments,
        "dpo_config": DPOConfig,
        "infer": InferArguments,
    }
    return {f.path: f for prefix, cls in groups.items() for f in dataclass_fields(cls, prefix)}


@pytest.fixture(scope="session")
def fields(
    reference: dict[str, Field], own_fields: dict[str, Field], modules: ModuleType
) -> list[Field]:
    """The argument tree, with the reference's rows where the model's constructor declares it."""
    hidden = frozenset({"train"})
    data = constructor_fields(modules.OmniDataModule, "data", hidden=hidden)
    model = constructor_fields(modules.ClassificationModule, "model", hidden=hidden)
    first, last = ({field.path: field for field in part} for part in (model, data))
    return list((first | reference | own_fields | last).values())
