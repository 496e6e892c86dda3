"""Whether the run's model can be divided over its ranks, told before anything is started."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from transformers import PretrainedConfig

from omnilit.config import AcceleratorConfig
from omnilit.config.parallel_rules import ASYNC, METHOD, SIZES, sizes_of
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem
from omnilit.models.build import load_model_config
from omnilit.models.fit import ModelNumbers, divides_model, fit_problems
from omnilit.models.sequence_fit import sequence_problems

MODEL: Final = ("model.config_path", "model.model_path", "model.trust_remote_code")


def find_misfits(view: View, wrong: Collection[str]) -> list[Problem]:
    """Problems between what `train.accelerator` asks for and the model's own configuration.

    That is read only where an axis divides the model, or an option asks for more of it.

    Args:
        view: The values.
        wrong: Paths that have a problem already.
    """
    if any(path in wrong for path in (*SIZES, ASYNC, METHOD, *MODEL)):
        return []
    sizes = sizes_of(view)
    split = AcceleratorConfig(
        ulysses_size=sizes.ulysses_size,
        enable_async=view[ASYNC],
        cp_size=sizes.cp_size,
        cp_method=view[METHOD],
    )
    if not divides_model(sizes) and split.cp_method == "gather":
        return []
    try:
        config = _read_config(view)
    except ConfigError as error:
        return list(error.problems)
    return [*fit_problems(sizes, ModelNumbers.of(config)), *sequence_problems(config, split)]


def read_numbers(view: View) -> ModelNumbers:
    """The numbers of the run's model.

    Raises:
        ConfigError: Its configuration is not named or cannot be read.
    """
    return ModelNumbers.of(_read_config(view))


def _read_config(view: View) -> PretrainedConfig:
    config_path, model_path, has_code = (view[path] for path in MODEL)
    return load_model_config(config_path, model_path, trust_remote_code=has_code)
