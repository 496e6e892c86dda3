"""What a run is made of, logged once before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from omnilit.callbacks.protocols import DescribedData, MeshStrategy, Table, TrainedModule
from omnilit.callbacks.trainer_view import datamodule_of
from omnilit.logging import format_table, get_logger

log = get_logger(__name__)
MANY_PASSES = 4.0  # beyond about four passes, repeated text teaches less and less


class StartupReport(Callback):
    """Log one table each for mesh, kernels, parameters and data, and the first sample.

    It comes when a checkpoint, if any, is loaded, on rank 0 only, once a `fit`.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        mesh = cast("MeshStrategy", trainer.strategy).topology.rows()
        kernels = cast("TrainedModule", pl_module).binding.rows()
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        has_stages = any(axis == "pp" for axis, *_ in mesh[1])
        held = "Parameters of the first stage's rank" if has_stages else "Parameters"
        for title, (header, rows) in (
            ("Mesh", mesh),
            ("Kernels", kernels),
            (held, parameter_rows(groups, pl_module)),
        ):
            log.info("%s", format_table(title, header, rows))
        datamodule = datamodule_of(trainer)
        if datamodule is not None:
            self._log_data(cast("DescribedData", datamodule))

    def _log_data(self, data: DescribedData) -> None:
        log.info("%s", format_table("Data", *data.rows()))
        passes = data.passes_per_epoch
        shown = "a stream" if passes is None else f"{passes:.2f} passes through the data"
        log.info("Data: %d steps an epoch, %s", data.steps_per_epoch, shown)
        if passes is not None and passes > MANY_PASSES:
            log.warning(
                "Data: an epoch passes %.1f times through the data; more than %d passes rarely "
                "help. Lower train.num_train_epochs or data.train_size, or add data.",
                passes,
                MANY_PASSES,
            )
        if text := data.first_sample_text():
            log.info("First sample\n%s", text)


def parameter_rows(groups: list[dict[str, Any]], pl_module: LightningModule) -> Table:
    """Header and rows: one row an optimizer group, then what is frozen, then the sum.

    Args:
        groups: The optimizers' groups; the learning rate shown is the one before any schedule.
        pl_module: Holds all parameters, frozen ones too.
    """
    header = ("group", "tensors", "parameters", "trainable", "weight decay", "lr")
    frozen = [p.numel() for p in pl_module.parameters() if not p.requires_grad]
    rows = list(_group_rows(groups))
    if frozen:
        rows.append(("frozen", len(frozen), f"{sum(frozen):,}", "no", "", ""))
    sizes = [p.numel() for p in pl_module.parameters()]
    rows.append(("all", len(sizes), f"{sum(sizes):,}", "", "", ""))
    return header, rows


def _group_rows(groups: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for group in groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        decay, lr = group["weight_decay"], _peak_lr(group)
        yield group["name"], len(sizes), f"{sum(sizes):,}", "yes", decay, f"{lr:.1e}"


def _peak_lr(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))  # a schedule sets `initial_lr`
