"""How evenly the routers load the experts, now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from omnilit.callbacks.every import EverySteps
from omnilit.errors import ConfigError
from omnilit.models.compilation import EXPERTS
from omnilit.models.places import is_experts
from omnilit.types import MicroBatch

KEY: Final = "train.log_expert_load_steps"


class _Topology(Protocol):
    @property
    def loss(self) -> DeviceMesh:
        """Every rank that holds tokens of its own."""
        ...

    @property
    def stages(self) -> ProcessGroup | None:
        """The ranks that hold the other stages of the model; None where it has one."""
        ...


class _Strategy(Protocol):
    @property
    def topology(self) -> _Topology:
        """The meshes of the run."""
        ...


class ExpertLoad(Callback):
    """Count the tokens that each expert is sent, over all ranks; `MetricsRecorder` writes it down.

    All micro-batches of a step count, padding does not, and what recomputation repeats counts
    once. The router's choices are read before tokens travel, so experts may be spread or not.

    Args:
        every_n_steps: Optimizer steps between two readings; 0 for none.

    Attributes:
        step: The step of the newest reading; 0 before the first.
        numbers: Those of that step: `<module>/<expert>`, the share of the layer's routed tokens
            that an expert got, and `<module>/max_over_mean`.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.step = 0
        self.numbers: dict[str, float] = {}
        self._every = EverySteps(every_n_steps)
        self._counter = ExpertCounter()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if cast("_Strategy", trainer.strategy).topology.stages is not None:
            raise ConfigError(
                key=KEY,
                problem="the load of experts is not logged in a pipeline (pp_size)",
                fix="leave it out, or leave pp_size out",
            )
        self.step, self.numbers = 0, {}
        self._every.begin_after(trainer.global_step)
        self._counter.attach(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._every.num_steps and (trainer.global_step + 1) % self._every.num_steps == 0:
            self._counter.listen(batch)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._counter.stop()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        step = trainer.global_step + 1  # Lightning counts it after this hook
        if self._every.is_due(step):
            group = cast("_Strategy", trainer.strategy).topology.loss.get_group()
            self.step, self.numbers = step, load_numbers(self._counter.take(group))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counter.detach()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._counter.detach()


class ExpertCounter:
    """Counts what the routers of a model choose, while it listens."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._is_listening = False
        self._is_real: Tensor | None = None

    def attach(self, module: nn.Module) -> None:
        """Put a hook on all experts of `module`, whose attribute names their names leave out.

        Raises:
            ConfigError: It has none.
        """
        self.detach()
        found = {name: part for name, part in module.named_modules() if is_experts(part)}
        if not found:
            raise ConfigError(
                key=KEY,
                problem="the model has no experts whose load could be logged",
                fix="leave it out",
            )
        for name, part in found.items():
            self._attach_one(name.partition(".")[2], part)

    def _attach_one(self, name: str, experts: nn.Module) -> None:
        weight = next(experts.parameters())  # one expert a row, whoever holds it
        self._counts[name] = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)

        def count(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            if self._is_listening:
                index = args[1] if len(args) > 1 else kwargs["top_k_index"]
                self._counts[name] += self._chosen(index, len(self._counts[name]))

        hook: Any = torch.compiler.disable(count, reason=EXPERTS)
        self._hooks.append(experts.register_forward_pre_hook(hook, with_kwargs=True))

    def _chosen(self, index: Tensor, num_experts: int) -> Tensor:
        if self._is_real is not None:
            index = index[self._is_real]
        return torch.bincount(index.flatten(), minlength=num_experts)[:num_experts]

    def detach(self) -> None:
        """Take the hooks off and forget all counts."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._counts.clear()
        self.stop()

    def listen(self, batch: object) -> None:
        """Count the choices for the tokens of `batch` that are data, until `stop`."""
        if isinstance(batch, MicroBatch):
            self._is_listening = bool(batch.origins)  # without, it only fills the window
            self._is_real = batch.is_real
        else:
            self._is_listening, self._is_real = True, None

    def stop(self) -> None:
        """Count nothing: what runs now is no forward of training."""
        self._is_listening, self._is_real = False, None

    def take(self, group: ProcessGroup | None = None) -> dict[str, list[int]]:
        """Routed tokens of each expert by module, summed over `group`; counts begin anew."""
        counts = torch.cat(list(self._counts.values()))
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(counts, group=group)
        sizes = [len(part) for part in self._counts.values()]
        for part in self._counts.values():
            part.zero_()
        parts = [part.tolist() for part in counts.split(sizes)]
        return dict(zip(self._counts, parts, strict=True))


def load_numbers(counts: Mapping[str, list[int]]) -> dict[str, float]:
    """Shares and largest share over the mean of them; of a layer without tokens nothing.

    Args:
        counts: Routed tokens of each expert, by module.
    """
    numbers: dict[str, float] = {}
    for name, routed in counts.items():
        if not (total := sum(routed)):
            continue
        numbers |= {f"{name}/{expert}": number / total for expert, number in enumerate(routed)}
        numbers[f"{name}/max_over_mean"] = max(routed) * len(routed) / total
    return numbers
