"""The first values of adapters: drawn, the same on any number of ranks, or those of a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.config.lora import LoraArguments
from omnilit.config.lora_rules import GROUP
from omnilit.errors import ConfigError
from omnilit.models.lora.plan import Adapter, AdapterPlan, same_strength
from omnilit.models.seeds import seed_of
from omnilit.models.weight_report import listed
from omnilit.parallel.collectives import raise_together
from omnilit.parallel.materialize import fill_parameter, named_tensors

KEY: Final = f"{GROUP}.adapter_path"
CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
# Settings of peft's, off by default, under which the same factors are another model
OTHER_MODEL: Final = (
    *("alpha_pattern", "rank_pattern", "use_dora", "use_qalora", "use_bdlora", "lora_bias"),
    *("alora_invocation_tokens", "layer_replication", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config"),
)
# Ways to start that change the model's own matrices as well
OTHER_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
READING: Final = (OSError, ValueError, KeyError, SafetensorError)


def fill_adapters(model: PreTrainedModel, plan: AdapterPlan, *, seed: int) -> None:
    """Give this rank's part of all adapters its first values; nothing is sent, every rank calls.

    Args:
        model: Materialised, sharded or not; the modules that are trained whole have values.
        plan: What is adapted.
        seed: `train.seed`.

    Raises:
        ConfigError: `adapter_path` holds no adapter, or one of other settings; on every rank.
    """
    own = named_tensors(model)
    folder = plan.arguments.adapter_path
    error: BaseException | None = None
    try:
        tensors = _drawn(plan, seed) if folder is None else _stored(plan, Path(folder).expanduser())
        for name, values in tensors:
            if name in own:  # else another stage's
                fill_parameter(own[name], values)
    except BaseException as caught:  # the others come to the same agreement
        error = caught
    raise_together(error)


def _drawn(plan: AdapterPlan, seed: int) -> Iterator[tuple[str, Tensor]]:
    for adapter in plan.adapters:
        yield from zip(adapter.names, draw(adapter, seed), strict=True)


def draw(adapter: Adapter, seed: int) -> tuple[Tensor, Tensor]:
    """The factors of an untrained adapter, which adds nothing yet.

    Source: peft's `reset_lora_parameters`: Kaiming's uniform with a = sqrt(5), and zeros.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, adapter.file_name))
    first, second = (torch.zeros(shape) for shape in adapter.file_shapes)
    bound = 1 / math.sqrt(adapter.num_inputs)
    return adapter.from_file(first.uniform_(-bound, bound, generator=generator), second)


def _stored(plan: AdapterPlan, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The trained tensors of a folder that peft could load."""
    try:
        _check_strength(folder, plan.arguments)
        with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as file:
            held = set(file.keys())
            wanted = set(plan.file_names().values())
            if held != wanted:
                odd = sorted(held ^ wanted)
                problem = f"{folder} adapts something else: {listed(odd)}"
                raise ConfigError(key=KEY, problem=problem, fix="name the same targets")
            for adapter in plan.adapters:
                pair = tuple(file.get_tensor(name) for name in adapter.file_names)
                if tuple(t.shape for t in pair) != adapter.file_shapes:
                    problem = f"{folder} has other shapes for {adapter.file_name}"
                    raise ConfigError(key=KEY, problem=problem, fix="give its own model")
                yield from zip(adapter.names, adapter.from_file(*pair), strict=True)
            names = plan.file_names()
            yield from ((name, file.get_tensor(names[name])) for name in plan.trained)
    except READING as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"name a folder with {CONFIG} and {WEIGHTS}"
        problem = f"no adapter can be read from {folder} ({reason})"
        raise ConfigError(key=KEY, problem=problem, fix=fix) from error


def _check_strength(folder: Path, lora: LoraArguments) -> None:
    saved: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = {
        "rank": saved["r"],
        "alpha": saved["lora_alpha"],
        "use_rslora": saved.get("use_rslora", False),
    }
    if differing := same_strength(known, lora):
        told = ", ".join(f"{name} {known[name]}" for name in differing)
        problem = f"{folder} was made with {told}"
        raise ConfigError(key=KEY, problem=problem, fix="set the same under model.lora")
    others = [name for name in OTHER_MODEL if saved.get(name)]
    if str(saved.get("init_lora_weights")).startswith(OTHER_BASE):
        others.append("init_lora_weights")
    if others:
        told = ", ".join(f"{name}: {saved[name]}" for name in others)
        problem = f"{folder} was made with {told}, which is not available here"
        fix = "merge it into its model by peft, and start from that"
        raise ConfigError(key=KEY, problem=problem, fix=fix)
