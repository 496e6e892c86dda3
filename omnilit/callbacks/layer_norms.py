"""The gradient norm of every decoder block, now and then."""

from __future__ import annotations

from collections import defaultdict

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from omnilit.callbacks.every import EverySteps
from omnilit.models.blocks import decoder_blocks
from omnilit.parallel.grad_norm import group_norms
from omnilit.parallel.mesh import Topology


class LayerGradNorms(Callback):
    """Read the norms before clipping, over all meshes; `MetricsRecorder` writes them down.

    Parameters outside the blocks stand by the module that owns them, so that the squares of all
    these norms add up to the square of `grad_norm`.

    Args:
        every_n_steps: Optimizer steps between two readings; 0 for none.

    Attributes:
        step: The step of the newest reading; 0 before the first.
        norms: Those of that step, by the module's name in the model.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.step = 0
        self.norms: dict[str, float] = {}
        self._every = EverySteps(every_n_steps)
        self._groups: dict[str, list[nn.Parameter]] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.norms = 0, {}
        self._every.begin_after(trainer.global_step)
        self._groups = group_by_block(pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        step = trainer.global_step + 1  # Lightning counts it after this hook
        if self._every.is_due(step):
            topology = getattr(trainer.strategy, "topology", None)
            stages = topology.stages if isinstance(topology, Topology) else None
            self.step, self.norms = step, group_norms(self._groups, stages=stages)


def group_by_block(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each decoder block, and of each module outside of them.

    Args:
        module: Holds the model under an attribute, which the names leave out.
    """
    names = {block: name for name, block in module.named_modules()}
    blocks = [f"{names[block]}." for block in decoder_blocks(module)]
    groups: defaultdict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            block = next((block for block in blocks if name.startswith(block)), "")
            owner = block.removesuffix(".") or name.rpartition(".")[0]
            groups[owner.partition(".")[2] or owner].append(parameter)
    return dict(groups)
