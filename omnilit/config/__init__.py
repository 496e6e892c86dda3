"""The argument tree: frozen dataclasses that hold the values of a configuration file.

They have no slots: the command line reads the defaults of a group from its `__dict__`.
"""

from omnilit.config.accelerator import (
    AcceleratorConfig,
    FSDPConfig,
    MixedPrecisionConfig,
    OffloadConfig,
)
from omnilit.config.checkpoint import CheckpointConfig
from omnilit.config.data import DataloaderConfig
from omnilit.config.dpo import DPOConfig
from omnilit.config.infer import InferArguments
from omnilit.config.lora import LoraArguments
from omnilit.config.model import OpsImplementationConfig
from omnilit.config.optimizer import OptimizerConfig
from omnilit.config.train import (
    GradientCheckpointingConfig,
    ProfileConfig,
    TrainingArguments,
    WandbConfig,
)

__all__ = [
    "AcceleratorConfig",
    "CheckpointConfig",
    "DPOConfig",
    "DataloaderConfig",
    "FSDPConfig",
    "GradientCheckpointingConfig",
    "InferArguments",
    "LoraArguments",
    "MixedPrecisionConfig",
    "OffloadConfig",
    "OpsImplementationConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "TrainingArguments",
    "WandbConfig",
]
