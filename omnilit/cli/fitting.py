"""Whether the run's model can be divided over its ranks, told before anything is started."""

from __future__ import annotations

from collections.abc import Collection

from omnilit.config.parallel_rules import SIZES, sizes_of
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem
from omnilit.models.build import load_model_config
from omnilit.models.fit import ModelNumbers, divides_model, fit_problems

CODE = "model.trust_remote_code"
MODEL = ("model.config_path", "model.model_path", CODE)


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
    config_path, model_path, has_code = (view[path] for path in MODEL)
    try:
        config = load_model_config(config_path, model_path, trust_remote_code=has_code)
    except ConfigError as error:
        return list(error.problems)
    return fit_problems(sizes, ModelNumbers.of(config))
