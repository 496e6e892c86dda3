"""A run's whole configuration as one tree, with what came from the environment left as written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, Final

from omnilit.cli.plan import OPS, Reading, RunPlan
from omnilit.cli.raw import Tree, put_leaf, walk_leaves
from omnilit.config.coerce import is_interpolation
from omnilit.config.view import View
from omnilit.kernels.slots import SLOTS

BUFFER: Final = "data.dyn_bsz_buffer_size"
GROUPS: Final = ("imports", "model", "data", "train", "dpo_config", "infer", "trainer")


def resolved_tree(plan: RunPlan) -> Tree:
    """Every field with its value: the same run when it is loaded.

    Fields whose being given means something in itself are there only where they were given. The
    kernels that a preset chose are in the log and in the checkpoints.
    """
    own = {BUFFER, *(f"{OPS}.{name}" for name in SLOTS)}
    left_out = {path for path in own if not plan.view.is_given(path)}
    tree = _values(plan.view, left_out)
    return _finish(tree, plan, plan.trainer)


def printed_tree(reading: Reading) -> Tree:
    """Every field of the task: what was given, else the reference's default."""
    tree = _values(View.of(reading.checked, list(reading.fields)), ())
    return _finish(tree, reading, {"accelerator": "auto", "devices": "auto", **reading.trainer})


def _values(view: View, left_out: Collection[str]) -> Tree:
    tree: Tree = {}
    for path, entry in view.fields.items():
        value = view[path]
        is_missing = entry.required and value is None  # null would not be a value of its type
        if not is_missing and path not in left_out:
            put_leaf(tree, path, list(value) if isinstance(value, tuple) else deepcopy(value))
    return tree


def _finish(tree: Tree, source: RunPlan | Reading, trainer: Mapping[str, Any]) -> Tree:
    """The groups in order, with every `${...}` as it was written: its value may be a secret."""
    tree["model"] = {"class_path": source.task.class_path, "init_args": tree["model"]}
    tree["trainer"] = deepcopy(dict(trainer))
    for path, value in walk_leaves(source.raw.written):
        if is_interpolation(value):
            put_leaf(tree, _nested(path), value)
    return {group: tree[group] for group in GROUPS if tree.get(group) not in (None, {})}


def _nested(path: str) -> str:
    """`path` for a `model` group that names its class."""
    is_field = path.startswith("model.") and path.split(".")[1] not in ("class_path", "init_args")
    return path.replace("model.", "model.init_args.", 1) if is_field else path
