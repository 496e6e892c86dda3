"""What the rules on a configuration say of values that are given."""

from __future__ import annotations

from typing import Any

from omnilit.config.rules import run_rules
from omnilit.config.schema import Field
from omnilit.config.view import View

GOOD = {"model.config_path": "m", "data.train_path": "d"}


def problems(fields: list[Field], given: dict[str, Any], **options: Any) -> list[str]:
    """All problems of a run that is good but for what is given, as users read them.

    Args:
        fields: The known ones.
        given: Values by path.
        options: See `View`.
    """
    known = {field.path: field for field in fields}
    assert given.keys() <= known.keys()
    return [str(problem) for problem in run_rules(View(known, GOOD | given, **options))]
