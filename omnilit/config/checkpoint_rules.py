"""Rules on what is written when: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.view import View
from omnilit.errors import Problem

GROUP: Final = "train.checkpoint"
SAVES: Final = (f"{GROUP}.save_steps", f"{GROUP}.save_epochs")
NEEDS_SAVES: Final = (f"{GROUP}.save_async", f"{GROUP}.keep_last")
EXPORTS: Final = f"{GROUP}.save_hf_weights"
NEEDS_EXPORTS: Final = (
    f"{GROUP}.hf_save_steps",
    f"{GROUP}.hf_save_epochs",
    f"{GROUP}.export_dtype",
)


def saves_are_on(view: View, path: str) -> list[Problem]:
    """A field of saving is given only where something is saved."""
    if not view.is_changed(path) or any(view[field] for field in SAVES):
        return []
    reason = "save_steps: 0 and save_epochs: 0 save nothing"
    return [_no_effect(view, path, reason, "set one of the two above 0")]


def exports_are_on(view: View, path: str) -> list[Problem]:
    """A field of exporting is given only where something is exported."""
    if not view.is_changed(path) or view[EXPORTS]:
        return []
    reason = "save_hf_weights: false turns all exports off"
    return [_no_effect(view, path, reason, "set save_hf_weights: true")]


def _no_effect(view: View, path: str, reason: str, remedy: str) -> Problem:
    value = str(view[path]).lower()  # as YAML writes it
    return Problem(path, f"{value} has no effect, because {reason}", f"leave it out, or {remedy}")
