"""Lightning's own callbacks: where they save here, and what of them is refused."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from omnilit.cli.stock import settle_callbacks
from omnilit.errors import ConfigError


def refused(tmp_path, *callbacks, has_evaluation=True):
    with pytest.raises(ConfigError) as caught:
        settle_callbacks(callbacks, tmp_path, has_evaluation=has_evaluation)
    return [str(problem) for problem in caught.value.problems]


def test_a_model_checkpoint_saves_beside_the_runs_own_unless_it_says_where(tmp_path):
    own, elsewhere = ModelCheckpoint(), ModelCheckpoint(dirpath=tmp_path / "elsewhere")
    settle_callbacks([LearningRateMonitor(), own, elsewhere], tmp_path, has_evaluation=False)
    assert own.dirpath == str(tmp_path / "checkpoints")
    assert elsewhere.dirpath == str(tmp_path / "elsewhere")


def test_what_cannot_be_is_named_all_at_once(tmp_path):
    callback = ModelCheckpoint(save_weights_only=True, save_on_exception=True)
    assert refused(tmp_path, callback) == [
        (
            "trainer.callbacks: ModelCheckpoint has save_weights_only: true, but checkpoints are "
            "saved whole. To fix: leave it out; the export of a checkpoint holds weights alone."
        ),
        (
            "trainer.callbacks: ModelCheckpoint has save_on_exception: true, but a rank that fails "
            "alone cannot save. To fix: leave it out, and set train.checkpoint.save_steps."
        ),
    ]


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_number_of_an_evaluation_that_never_comes_is_refused(tmp_path, kind):
    (problem,) = refused(tmp_path, kind(monitor="eval_loss"), has_evaluation=False)
    assert problem == (
        f"trainer.callbacks: {kind.__name__} watches eval_loss, but data.eval_path is not given. "
        "To fix: give data.eval_path, or watch another number such as loss."
    )
    settle_callbacks([kind(monitor="eval_loss")], tmp_path, has_evaluation=True)
    settle_callbacks([kind(monitor="loss")], tmp_path, has_evaluation=False)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: OnExceptionCheckpoint("."), "a rank that fails alone cannot save"),
        (lambda: StochasticWeightAveraging(swa_lrs=0.1), "averages a copy of the module"),
        (EMAWeightAveraging, "averages a copy of the module"),
        (lambda: ModelPruning("l1_unstructured"), "prunes whole parameters"),
        (lambda: GradientAccumulationScheduler({0: 2}), "how many micro-batches a step has"),
        (BatchSizeFinder, "a budget of tokens"),
        (LearningRateFinder, "set train.optimizer.lr"),
    ],
)
def test_what_would_hang_ranks_fail_or_do_nothing_is_refused(tmp_path, make, why):
    callback = make()
    (problem,) = refused(tmp_path, callback)
    assert problem.startswith(f"trainer.callbacks: {type(callback).__name__} ")
    assert why in problem
