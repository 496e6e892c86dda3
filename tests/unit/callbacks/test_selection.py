"""A setting brings its callback, and what is off brings none."""

from __future__ import annotations

from typing import Any

import pytest

from omnilit.callbacks.expert_load import ExpertLoad
from omnilit.callbacks.layer_norms import LayerGradNorms
from omnilit.callbacks.memory import CacheRelease, GarbageCollector
from omnilit.callbacks.profiler import StepProfiler
from omnilit.callbacks.selection import chosen_callbacks
from omnilit.config import ProfileConfig, TrainingArguments

OFF: dict[str, Any] = {"gc_steps": 0, "empty_cache_steps": 0}


def test_the_defaults_give_memory_back_and_do_no_more():
    kinds = [type(callback) for callback in chosen_callbacks(TrainingArguments())]
    assert kinds == [GarbageCollector, CacheRelease]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"gc_steps": 3}, GarbageCollector),
        ({"empty_cache_steps": 3}, CacheRelease),
        ({"log_layer_grad_norms_steps": 3}, LayerGradNorms),
        ({"log_expert_load_steps": 3}, ExpertLoad),
        ({"profile": ProfileConfig(enable=True)}, StepProfiler),
    ],
)
def test_each_setting_brings_its_own_callback_alone(settings, kind):
    (callback,) = chosen_callbacks(TrainingArguments(**(OFF | settings)))
    assert type(callback) is kind


def test_all_off_is_nothing():
    assert chosen_callbacks(TrainingArguments(**OFF)) == []
