"""What a classifier takes for what, as a table in the log and for the loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from omnilit.callbacks.protocols import TrainedModule
from omnilit.callbacks.showing import Exhibit, show_exhibit
from omnilit.callbacks.trainer_view import is_trial_run
from omnilit.logging import format_table, get_logger
from omnilit.types import Confusion

log = get_logger(__name__)
NAME: Final = "eval_confusion"
MAX_SHOWN: Final = 20  # classes of a table in the log


class ConfusionTable(Callback):
    """Show the confusion matrix of every evaluation of a classifier; of other tasks nothing.

    It goes into the log, where it is small, to TensorBoard as a text and to wandb as a table.
    `MetricsRecorder` writes the numbers.
    """

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        confusion = cast("TrainedModule", pl_module).eval_confusion
        if confusion is None or not trainer.is_global_zero or is_trial_run(trainer):
            return
        header, rows = table_of(confusion)
        if len(confusion.names) <= MAX_SHOWN:
            title = "evaluation: classes (rows) and what they were taken for"
            log.info(format_table(title, header, rows))
        exhibit = Exhibit(NAME, header, rows, {NAME: to_markdown(header, rows)})
        show_exhibit(trainer.loggers, exhibit, step=trainer.global_step)


def table_of(confusion: Confusion) -> tuple[list[str], list[list[object]]]:
    """Header and rows: the name of each class, then how many texts were taken for each class."""
    rows = zip(confusion.names, confusion.counts, strict=True)
    return ["class", *confusion.names], [[name, *counts] for name, counts in rows]


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as TensorBoard shows it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_escape(str(cell)) for cell in line)} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
