"""Classification of texts: one class each, at the last token."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from omnilit.config.class_rules import class_problems
from omnilit.data.transforms import CLASSIFICATION
from omnilit.errors import ConfigError
from omnilit.losses.classification import class_terms
from omnilit.models.class_labels import as_classifier, class_names
from omnilit.modules.base import OmniModule
from omnilit.modules.class_metrics import ClassMetrics
from omnilit.types import IGNORE, Confusion, LossTerm, MicroBatch


class ClassificationModule(OmniModule):
    """Trains a model with a head of classes to tell which class a text or conversation is of.

    The loss is the mean over all texts of the step on all ranks. The names of the classes are
    saved with the model. A language model's weights are a start: the head is new then.

    Args:
        num_labels: Number of classes; default: that of the names, or of a model that is a
            classifier already.
        label_names: Names of the classes by number; default: those of such a model, else LABEL_0,
            LABEL_1, ...
        kwargs: The arguments of `OmniModule`.
    """

    data_type: ClassVar[str | None] = CLASSIFICATION

    def __init__(
        self,
        *,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if problems := class_problems(num_labels, label_names):
            raise ConfigError.of(problems)
        self.num_labels = num_labels
        self.label_names = label_names
        self._metrics: ClassMetrics | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes by number."""
        names = class_names(self.model_config)
        assert names is not None, "the configuration is a classifier's"
        return names

    @override
    def _choose_model(self, config: PretrainedConfig) -> PretrainedConfig:
        return as_classifier(
            config,
            num_labels=self.num_labels,
            label_names=self.label_names,
            trust_remote_code=self.trust_remote_code,
        )

    @override
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        output = self.assembled.forward(batch)
        assert output.class_logits is not None, "the model is a classifier"
        predicted = output.class_logits.detach().argmax(-1)
        labels = batch.labels[batch.labels != IGNORE]
        self._count(predicted, labels)
        return class_terms(output.token_losses, predicted == labels, balance=output.balance)

    def _count(self, predicted: Tensor, labels: Tensor) -> None:
        if self._metrics is not None:  # while an evaluation runs
            self._metrics.add(predicted, labels)

    @override
    def on_validation_epoch_start(self) -> None:
        group, device = self.topology.loss.get_group(), self.topology.device
        self._metrics = ClassMetrics(len(self.classes), group=group, device=device)

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        metrics = self._metrics
        assert metrics is not None, "the evaluation has begun"
        assert self.eval_result is not None, "it has been read"
        self._metrics = None
        means, counts = self.assembled.read_on_last(metrics.read)
        self.eval_confusion = Confusion(self.classes, counts)
        own = {f"eval_{name}": mean for name, mean in means.items()}
        self.eval_result |= own
        # equal on all ranks already
        self.log_dict(own, logger=False, sync_dist=True)
