"""Whether the run's model can be divided over its ranks, told before anything is started."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch
from transformers import PretrainedConfig

from omnilit.config import AcceleratorConfig
from omnilit.config.class_rules import NAMES, NUMBER
from omnilit.config.parallel_rules import ASYNC, METHOD, SIZES, sizes_of
from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.config.pipeline_rules import PER_RANK
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem
from omnilit.models.build import build_meta, load_model_config
from omnilit.models.class_labels import as_classifier
from omnilit.models.fit import ModelNumbers, divides_model, fit_problems
from omnilit.models.sequence_fit import sequence_problems
from omnilit.models.stages import find_uncut
from omnilit.models.tensor_parallel import find_unsplit

MODEL: Final = ("model.config_path", "model.model_path", "model.trust_remote_code")


def find_misfits(view: View, wrong: Collection[str]) -> list[Problem]:
    """Problems between what `train.accelerator` asks for and the model's own configuration.

    That is read only where an axis divides the model, an option asks for more of it, or the task
    has classes.

    Args:
        view: The values.
        wrong: Paths that have a problem already.
    """
    if any(path in wrong for path in (*SIZES, ASYNC, METHOD, PER_RANK, *MODEL, NUMBER, NAMES)):
        return []
    is_divided = divides_model(sizes_of(view))
    if not is_divided and NUMBER not in view:
        return []
    try:
        config = read_config(view)
    except ConfigError as error:
        return list(error.problems)
    return judge(view, config) if is_divided else []


def judge(view: View, config: PretrainedConfig) -> list[Problem]:
    """Why a model cannot be divided as `train.accelerator` asks; nothing where it can.

    Args:
        view: The values; sizes and options are good.
        config: Of the model.
    """
    sizes = sizes_of(view)
    found = fit_problems(sizes, ModelNumbers.of(config), stages_per_rank=view[PER_RANK])
    if max(sizes.tp_size, sizes.pp_size) > 1 and not found:
        found += _judge_modules(config, sizes, trust_remote_code=view[MODEL[-1]])
    split = AcceleratorConfig(
        ulysses_size=sizes.ulysses_size,
        enable_async=view[ASYNC],
        cp_size=sizes.cp_size,
        cp_method=view[METHOD],
    )
    return [*found, *sequence_problems(config, split)]


def _judge_modules(
    config: PretrainedConfig, sizes: ParallelSizes, *, trust_remote_code: bool
) -> list[Problem]:
    """What only the model itself tells: on the meta device, without memory, in a moment."""
    try:
        model = build_meta(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        return list(error.problems)
    found: list[Problem] = []
    if sizes.tp_size > 1:
        with_experts = sizes.ep_size == 1
        found += find_unsplit(model, tp_size=sizes.tp_size, with_experts=with_experts)
    if sizes.pp_size > 1 and not found:
        found += find_uncut(model)
    return found


def read_config(view: View) -> PretrainedConfig:
    """The configuration of the run's model: a classifier's where the task has classes.

    Raises:
        ConfigError: It is not named or cannot be read, or the classes are not known.
    """
    config_path, model_path, has_code = (view[path] for path in MODEL)
    config = load_model_config(config_path, model_path, trust_remote_code=has_code)
    if NUMBER not in view:
        return config
    return as_classifier(
        config, num_labels=view[NUMBER], label_names=view[NAMES], trust_remote_code=has_code
    )
