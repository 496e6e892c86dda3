"""Rules on `model.lora`: pure functions of the values."""

from __future__ import annotations

from typing import Final

from omnilit.config.lora import LoraArguments
from omnilit.config.parallel_rules import RECOMPUTE
from omnilit.config.tensor_rules import TP
from omnilit.config.view import View
from omnilit.errors import Problem

GROUP: Final = "model.lora"
MODEL: Final = "model.model_path"
REENTRANT: Final = f"{RECOMPUTE}.enable_reentrant"
RECOMPUTES: Final = f"{RECOMPUTE}.enable"
FIELDS: Final = tuple(
    f"{GROUP}.{name}"
    for name in (
        *("enable", "rank", "alpha", "use_rslora", "dropout", "target_modules"),
        *("exclude_modules", "target_parameters", "modules_to_save", "adapter_path"),
    )
)
INDEX: Final = "model.safetensor_idx_path"
READ: Final = (*FIELDS, MODEL, INDEX, TP, RECOMPUTES, REENTRANT)


def adapters_are_possible(view: View) -> list[Problem]:
    """Problems of the adapters that are asked for; none where there are to be none."""
    values = {path.rpartition(".")[2]: view[path] for path in FIELDS}
    if view.verb in ("infer", "data"):
        return []
    found = lora_problems(
        LoraArguments(**values),
        model_path=view[MODEL],
        tp_size=view[TP],
        is_reentrant=view[RECOMPUTES] and view[REENTRANT],
    )
    return [*found, *_without_effect(view)]


def _without_effect(view: View) -> list[Problem]:
    enable, *others = FIELDS
    if view[enable] and view[INDEX]:
        problem = "has no effect with model.lora: an export of adapters is one file"
        return [Problem(INDEX, problem, "leave it out")]
    changed = [path.rpartition(".")[2] for path in others if view.is_changed(path)]
    if not changed or enable in view.given:  # who writes `enable: false` means it
        return []
    problem = f"is not given, so the whole model would be trained, and {', '.join(changed)} ignored"
    return [Problem(enable, problem, "set enable: true, or leave the group out")]


def lora_problems(
    lora: LoraArguments, *, model_path: str | None, tp_size: int, is_reentrant: bool
) -> list[Problem]:
    """The same of the values alone.

    Args:
        lora: `model.lora`.
        model_path: `model.model_path`.
        tp_size: Ranks that split each matrix.
        is_reentrant: Whether activations are recomputed in the reentrant form.
    """
    found = _wrong_values(lora)
    if not lora.enable:
        return found
    if model_path is None:
        problem = "adapters are trained beside the weights of a model, and model_path names none"
        found.append(Problem(f"{GROUP}.enable", problem, "give model.model_path"))
    if tp_size > 1 and lora.target_parameters:
        problem = f"parameters cannot be adapted with tp_size: {tp_size}, which splits them"
        found.append(Problem(f"{GROUP}.target_parameters", problem, "leave tp_size out"))
    if tp_size > 1 and lora.dropout:
        problem = f"{lora.dropout} is not possible with tp_size: {tp_size}: ranks would drop "
        found.append(Problem(f"{GROUP}.dropout", f"{problem}other inputs", "set dropout: 0"))
    if is_reentrant:
        problem = "the reentrant form passes no gradient to adapters behind a frozen embedding"
        found.append(Problem(REENTRANT, problem, "set enable_reentrant: false"))
    return found


def _wrong_values(lora: LoraArguments) -> list[Problem]:
    found: list[Problem] = []
    if lora.rank < 1:
        found.append(Problem(f"{GROUP}.rank", f"{lora.rank} is out of range", "use 8, or above"))
    if not lora.alpha > 0:
        found.append(Problem(f"{GROUP}.alpha", f"{lora.alpha} is out of range", "use 16"))
    if not 0 <= lora.dropout < 1:
        problem = f"{lora.dropout} is out of range"
        found.append(Problem(f"{GROUP}.dropout", problem, "use at least 0 and below 1"))
    if lora.dropout and lora.target_parameters:
        problem = f"{lora.dropout} is not possible with target_parameters, whose inputs nobody sees"
        found.append(Problem(f"{GROUP}.dropout", problem, "set dropout: 0"))
    lists = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules")
    for name in lists:
        entries = getattr(lora, name)
        if entries == "" or (isinstance(entries, list) and not all(e.strip() for e in entries)):
            problem = "an empty name matches nothing"
            found.append(Problem(f"{GROUP}.{name}", problem, "take it out"))
    if not lora.target_modules and not lora.target_parameters:
        problem = "nothing is to be adapted"
        fix = "name layers, such as [q_proj, v_proj], or all-linear"
        found.append(Problem(f"{GROUP}.target_modules", problem, fix))
    return found
