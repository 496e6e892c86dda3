"""Rules on the optimizer and on compiled blocks: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.optimizer import OptimizerConfig
from omnilit.config.view import View
from omnilit.errors import Problem

TYPE: Final = "train.optimizer.type"
KAHAN: Final = "train.optimizer.use_kahan_summation"
BETAS: Final = "train.optimizer.betas"
MASTER: Final = "train.accelerator.fsdp_config.mixed_precision.master_dtype"
COMPILE: Final = "train.enable_compile"
RECOMPUTE: Final = "train.gradient_checkpointing.enable"
DEBUG: Final = "train.gradient_checkpointing.debug"
# Rounding to bfloat16's 8 bits moves a number by up to 2 ** -8 of itself. An average that falls
# by less than that in a step is rounded back up in each.
HIGHEST_BETA: Final = 1 - 2**-8


def optimizer_fits_its_type(view: View) -> list[Problem]:
    """Settings mean something to the type of optimizer, and to the weights."""
    config = OptimizerConfig(type=view[TYPE], betas=view[BETAS], use_kahan_summation=view[KAHAN])
    return optimizer_problems(config, master_dtype=view[MASTER])


def optimizer_problems(config: OptimizerConfig, *, master_dtype: str) -> list[Problem]:
    """The same of the values alone.

    Args:
        config: Of the optimizer.
        master_dtype: Name of the type that weights are stored in.
    """
    if config.type != "anyprecision_adamw":
        if not config.use_kahan_summation:
            return []
        problem = f"true has no effect, because type: {config.type} has no Kahan summation"
        return [Problem(KAHAN, problem, "leave it out, or set type: anyprecision_adamw")]
    problems = []
    if config.use_kahan_summation and master_dtype == "float32":
        problem = (
            "true has no effect, because weights of master_dtype: float32 are stored as they are "
            "computed, and nothing is rounded off"
        )
        fix = "leave it out, or set mixed_precision.master_dtype: bfloat16"
        problems.append(Problem(KAHAN, problem, fix))
    if max(config.betas) <= HIGHEST_BETA:
        return problems
    problem = (
        f"{list(config.betas)} holds an average that could never fall: type: anyprecision_adamw "
        "keeps it in bfloat16, which rounds such a small change away"
    )
    fix = f"use numbers up to {HIGHEST_BETA:.3f}, or type: adamw"
    return [*problems, Problem(BETAS, problem, fix)]


def compiled_blocks_are_not_watched(view: View) -> list[Problem]:
    """A debugged recomputation watches every operation, and torch compiles nothing meanwhile."""
    if not (view[COMPILE] and view[RECOMPUTE] and view[DEBUG]):
        return []
    problem = "true watches every operation of a block, so enable_compile: true compiles none"
    return [Problem(DEBUG, problem, "set enable_compile: false while you debug")]
