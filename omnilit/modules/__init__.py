"""Tasks: what a step computes, on which model and data."""

from omnilit.modules.base import OmniModule
from omnilit.modules.classification import ClassificationModule
from omnilit.modules.datamodule import OmniDataModule
from omnilit.modules.dpo import DPOModule
from omnilit.modules.later import (
    DiffusionModule,
    OmniComposedModule,
)
from omnilit.modules.sft import SFTModule
from omnilit.modules.vlm import VLMModule

__all__ = [
    "ClassificationModule",
    "DPOModule",
    "DiffusionModule",
    "OmniComposedModule",
    "OmniDataModule",
    "OmniModule",
    "SFTModule",
    "VLMModule",
]
