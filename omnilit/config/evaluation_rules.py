"""Rules on evaluation: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.view import View
from omnilit.errors import Problem

STEPS: Final = "train.eval_steps"
DATA: Final = "data.eval_path"
DATA_TYPE: Final = "data.data_type"
SAMPLES: Final = "train.eval_samples"
MAX_TOKENS: Final = "train.eval_samples_max_tokens"
WITHOUT_TEXT: Final = ("classification", "diffusion")  # types of data that no text goes on from


def evaluation_has_data(view: View) -> list[Problem]:
    """`eval_steps` is given with data to evaluate on."""
    steps = view[STEPS]
    if not steps or view[DATA]:
        return []
    problem = f"evaluation is due every {steps} steps, but data.eval_path is not given"
    return [Problem(STEPS, problem, "give data.eval_path, or set eval_steps: 0")]


def samples_have_prompts(view: View) -> list[Problem]:
    """`eval_samples` is given with data that has prompts."""
    if not view[SAMPLES]:
        return []
    if not view[DATA]:
        problem = "has no effect: data.eval_path, where the prompts are from, is not given"
        return [Problem(SAMPLES, problem, "give data.eval_path, or set eval_samples: 0")]
    if view[DATA_TYPE] in WITHOUT_TEXT:
        problem = f"has no effect with data_type: {view[DATA_TYPE]}, which asks for no text"
        return [Problem(SAMPLES, problem, "leave it out")]
    return []


def length_has_samples(view: View) -> list[Problem]:
    """`eval_samples_max_tokens` is given with samples."""
    if view[SAMPLES] or not view.is_changed(MAX_TOKENS):
        return []
    return [Problem(MAX_TOKENS, "has no effect: eval_samples is 0", "give eval_samples too")]
