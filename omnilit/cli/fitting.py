"""Whether the run's model can be divided over its ranks, told before anything is started."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from omnilit.config.parallel_rules import SIZES, sizes_of
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem
from omnilit.models.build import load_model_config
from omnilit.models.fit import ModelNumbers, divides_model, fit_problems

MODEL: Final = ("model.config_path", "model.model_path", "model.trust_remote_code")


def find_misfits(view: View, wrong: Collection[str]) -> list[Problem]:
    """Problems between the sizes of the parallel axes and the model's own numbers.

    The model's configuration is read only where an axis divides the model.

    Args:
        view: The values.
        wrong: Paths that have a problem already.
    """
    if any(path in wrong for path in (*SIZES, *MODEL)):
        return []
    sizes = sizes_of(view)
    if not divides_model(sizes):
        return []
    try:
        return fit_problems(sizes, read_numbers(view))
    except ConfigError as error:
        return list(error.problems)


def read_numbers(view: View) -> ModelNumbers:
    """The numbers of the run's model.

    Raises:
        ConfigError: Its configuration is not named or cannot be read.
    """
    config_path, model_path, has_code = (view[path] for path in MODEL)
    config = load_model_config(config_path, model_path, trust_remote_code=has_code)
    return ModelNumbers.of(config)
