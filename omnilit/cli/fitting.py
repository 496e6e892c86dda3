"""Whether the run's model can be divided over its ranks, told before anything is started."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from transformers import PretrainedConfig

from omnilit.config import AcceleratorConfig
from omnilit.config.parallel_rules import ASYNC, METHOD, SIZES, sizes_of
from omnilit.config.pipeline_rules import PER_RANK
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem
from omnilit.models.build import load_model_config
from omnilit.models.fit import ModelNumbers, divides_model, fit_problems
from omnilit.models.sequence_fit import sequence_problems
from omnilit.models.stages import find_uncut
from omnilit.models.tensor_parallel import find_unsplit

MODEL: Final = ("model.config_path", "model.model_path", "model.trust_remote_code")


def find_misfits(view: View, wrong: Collection[str]) -> list[Problem]:
    """Problems between what `train.accelerator` asks for and the model's own configuration.

    That is read only where an axis divides the model, or an option asks for more of it.

    Args:
        view: The values.
        wrong: Paths that have a problem already.
    """
    if any(path in wrong for path in (*SIZES, ASYNC, METHOD, PER_RANK, *MODEL)):
        return []
    if not divides_model(sizes_of(view)) and view[METHOD] == "gather":
        return []
    try:
        config = read_config(view)
    except ConfigError as error:
        return list(error.problems)
    return judge(view, config)


def judge(view: View, config: PretrainedConfig) -> list[Problem]:
    """Why a model cannot be divided as `train.accelerator` asks; nothing where it can.

    Args:
        view: The values; sizes and options are good.
        config: Of the model.
    """
    sizes = sizes_of(view)
    found = fit_problems(sizes, ModelNumbers.of(config), stages_per_rank=view[PER_RANK])
    if sizes.tp_size > 1 and not found:
        found += find_unsplit(
            config,
            tp_size=sizes.tp_size,
            with_experts=sizes.ep_size == 1,
            trust_remote_code=view[MODEL[-1]],
        )
    if sizes.pp_size > 1 and not found:
        found += find_uncut(config, trust_remote_code=view[MODEL[-1]])
    split = AcceleratorConfig(
        ulysses_size=sizes.ulysses_size,
        enable_async=view[ASYNC],
        cp_size=sizes.cp_size,
        cp_method=view[METHOD],
    )
    return [*found, *sequence_problems(config, split)]


def read_config(view: View) -> PretrainedConfig:
    """The configuration of the run's model.

    Raises:
        ConfigError: It is not named or cannot be read.
    """
    config_path, model_path, has_code = (view[path] for path in MODEL)
    return load_model_config(config_path, model_path, trust_remote_code=has_code)
