"""What people look at in loggers: a table, where they have such, else texts and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image


@dataclass(frozen=True, slots=True)
class Exhibit:
    """Something to look at, in both of the forms that loggers take.

    Args:
        tag: Of the table.
        columns: Their names.
        rows: Cells: texts, numbers, pictures, or None.
        texts: The same as Markdown by tag, for loggers without tables.
        pictures: Likewise.
    """

    tag: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    texts: Mapping[str, str]
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


def show_exhibit(loggers: Iterable[Logger], exhibit: Exhibit, *, step: int) -> None:
    """Give it to every logger that shows such things: TensorBoard's and wandb's.

    Args:
        loggers: Any of Lightning's.
        exhibit: What to show.
        step: Optimizer step.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, text in exhibit.texts.items():
                logger.experiment.add_text(tag, text, step)
            for tag, picture in exhibit.pictures.items():
                pixels = np.asarray(picture.convert("RGB"))
                logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            rows = [[_to_wandb(cell) for cell in row] for row in exhibit.rows]
            logger.log_table(exhibit.tag, columns=list(exhibit.columns), data=rows, step=step)


def _to_wandb(cell: object) -> object:
    if not isinstance(cell, Image.Image):
        return cell
    import wandb

    return wandb.Image(cell)
