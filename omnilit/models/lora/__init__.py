"""Adapters of low rank beside the frozen matrices of a model."""

from omnilit.models.lora.attach import AdaptedModel, adapt, saved_tensors
from omnilit.models.lora.plan import Adapter, AdapterPlan, plan_adapters
from omnilit.models.lora.values import fill_adapters

__all__ = [
    "AdaptedModel",
    "Adapter",
    "AdapterPlan",
    "adapt",
    "fill_adapters",
    "plan_adapters",
    "saved_tensors",
]
