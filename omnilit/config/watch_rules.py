"""Rules on what watches a run: the profiler and the loggers."""

from __future__ import annotations

from typing import Final

from omnilit.config.view import View
from omnilit.errors import Problem

PROFILE: Final = "train.profile"
START: Final = f"{PROFILE}.start_step"
END: Final = f"{PROFILE}.end_step"
WANDB: Final = "train.wandb"
NAMED: Final = tuple(f"{WANDB}.{name}" for name in ("project", "name", "id", "group", "entity"))
URL_PARTS: Final = frozenset({f"{WANDB}.project", f"{WANDB}.id", f"{WANDB}.entity"})
NOT_IN_URL: Final = "/\\#?%:"
MAX_NAME: Final = 128  # characters of a project, a run or a group there
MAX_TAG: Final = 64


def range_has_a_step(view: View) -> list[Problem]:
    """`end_step` lies behind `start_step`."""
    start, end = view[START], view[END]
    if start < end:
        return []
    return [
        Problem(
            END,
            f"{end} ends the range before its first step, start_step {start}",
            f"choose end_step above start_step, such as {start + 1}",
        )
    ]


def range_is_reached(view: View) -> list[Problem]:
    """The run is long enough to come to `start_step`."""
    start, per_epoch = view[START], view["train.max_steps"]
    if not view[f"{PROFILE}.enable"] or per_epoch is None:
        return []
    most = per_epoch * view["train.num_train_epochs"]
    if start <= most:
        return []
    return [
        Problem(
            START,
            f"{start} is never reached: max_steps * num_train_epochs ends the run at step {most}",
            "choose an earlier step, or a longer run",
        )
    ]


def name_is_legal(view: View, path: str) -> list[Problem]:
    """The service takes the name; null is its own choice."""
    name: str | None = view[path]
    if name is None:
        return []
    if not name.strip() or len(name) > MAX_NAME:
        return [Problem(path, f"{name!r} is no name", f"use 1 to {MAX_NAME} characters")]
    wrong = sorted({character for character in name if character in NOT_IN_URL})
    if path not in URL_PARTS or not wrong:
        return []
    problem = f"{name!r} holds {' '.join(wrong)}, and it becomes part of an address"
    return [Problem(path, problem, "use letters, digits, - and _")]


def tags_are_legal(view: View) -> list[Problem]:
    """The service takes every tag."""
    path = f"{WANDB}.tags"
    wrong = [tag for tag in view[path] if not tag.strip() or len(tag) > MAX_TAG]
    if not wrong:
        return []
    return [Problem(path, f"{wrong[0]!r} is no tag", f"use 1 to {MAX_TAG} characters a tag")]
