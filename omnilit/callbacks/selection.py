"""The callbacks that a run asks for by its settings, beside those that every run has."""

from __future__ import annotations

from lightning.pytorch import Callback

from omnilit.callbacks.expert_load import ExpertLoad
from omnilit.callbacks.layer_norms import LayerGradNorms
from omnilit.callbacks.memory import CacheRelease, GarbageCollector
from omnilit.callbacks.profiler import StepProfiler
from omnilit.config import TrainingArguments


def chosen_callbacks(train: TrainingArguments) -> list[Callback]:
    """What `train` turns on; what it leaves at 0 or off costs nothing.

    Args:
        train: The `train` group.
    """
    chosen: list[Callback] = []
    if train.log_layer_grad_norms_steps:
        chosen.append(LayerGradNorms(train.log_layer_grad_norms_steps))
    if train.log_expert_load_steps:
        chosen.append(ExpertLoad(train.log_expert_load_steps))
    if train.profile.enable:
        chosen.append(StepProfiler(train.profile))
    if train.gc_steps:
        chosen.append(GarbageCollector(train.gc_steps))
    if train.empty_cache_steps:
        chosen.append(CacheRelease(train.empty_cache_steps))
    return chosen
