"""How well a classifier does on data that it was not trained on, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from omnilit.types import IGNORE


class ClassMetrics:
    """Counts what an evaluation's sequences are and what they were taken for.

    Args:
        num_labels: Classes.
        group: The ranks that evaluate sequences of their own.
        device: Where the counts are.
    """

    def __init__(self, num_labels: int, *, group: ProcessGroup, device: torch.device) -> None:
        common = {"ignore_index": IGNORE, "process_group": group}
        self._metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_labels, average="micro", **common),
                "f1": MulticlassF1Score(num_labels, average="macro", **common),
                "confusion": MulticlassConfusionMatrix(num_labels, **common),
            },
            compute_groups=False,  # which are found by values, and so not the same on all ranks
        ).to(device)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Add a micro-batch.

        Args:
            predicted: The likeliest class of each sequence, [R]; R may be 0.
            labels: The right one, [R].
        """
        # one more that is not counted, since the metrics cannot be given none
        self._metrics.update(pad(predicted, (0, 1)), pad(labels, (0, 1), value=IGNORE))

    def read(self) -> tuple[dict[str, float], list[list[int]]]:
        """What was counted on all ranks of the group, which all call.

        Returns:
            Accuracy, and the mean of the classes' F1, of those that are there or were predicted;
            and the confusion matrix: how many sequences of each class (row) were taken for each
            (column).
        """
        found = self._metrics.compute()
        return {name: found[name].item() for name in ("accuracy", "f1")}, found[
            "confusion"
        ].tolist()
