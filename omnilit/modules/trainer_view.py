"""What a module asks its trainer: the meshes, and the sizes that the strategy owns."""

from __future__ import annotations

from lightning.pytorch import Trainer

from omnilit.config import AcceleratorConfig
from omnilit.errors import ConfigError
from omnilit.parallel.mesh import Topology


def topology_of(trainer: Trainer) -> Topology:
    """The meshes of a run.

    Raises:
        ConfigError: The trainer has another strategy than `OmniStrategy`.
    """
    topology = getattr(trainer.strategy, "topology", None)
    if not isinstance(topology, Topology):
        raise ConfigError(
            key="trainer.strategy",
            problem=f"{type(trainer.strategy).__name__} builds no meshes for omnilit",
            fix="use Trainer(strategy=OmniStrategy())",
        )
    return topology


def accelerator_of(trainer: Trainer, own: AcceleratorConfig) -> AcceleratorConfig:
    """`train.accelerator`, which the strategy owns.

    Args:
        trainer: Of the module.
        own: What the module was given.

    Raises:
        ConfigError: The module was given another one than the strategy.
    """
    config = getattr(trainer.strategy, "config", own)
    if own not in (config, AcceleratorConfig()):
        raise ConfigError(
            key="train.accelerator",
            problem="the module and the strategy were given different ones",
            fix="give OmniStrategy(train.accelerator) the module's own",
        )
    return config
