"""Lightning's own callbacks in a run of ours: where they save, and what of them cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from omnilit.checkpoint.layout import checkpoints_folder
from omnilit.errors import ConfigError, Problem

KEY: Final = "trainer.callbacks"
ALONE: Final = "a rank that fails alone cannot save"
SAVE_STEPS: Final = "leave it out, and set train.checkpoint.save_steps"
LATE: Final = "the model is built, and sharded, only when the run starts"
# Callbacks that fail here, hang other ranks or do nothing: why, and what to do instead
REFUSED: Final[tuple[tuple[type[Callback], str, str], ...]] = (
    (OnExceptionCheckpoint, f"saves after an error, but {ALONE}", SAVE_STEPS),
    (StochasticWeightAveraging, f"averages a copy of the module, but {LATE}", "leave it out"),
    (WeightAveraging, f"averages a copy of the module, but {LATE}", "leave it out"),
    (ModelPruning, f"prunes whole parameters, but {LATE}", "leave it out"),
    (
        GradientAccumulationScheduler,
        "changes how many micro-batches a step has, which train.global_batch_size decides",
        "leave it out, and set train.global_batch_size",
    ),
    (
        BatchSizeFinder,
        "looks for a size by runs of its own, but batches here are packed to a budget of tokens",
        "leave it out, and set train.micro_batch_size",
    ),
    (
        LearningRateFinder,
        "looks for an attribute lr, but rates here are those of train.optimizer",
        "leave it out, and set train.optimizer.lr",
    ),
)


def settle_callbacks(
    callbacks: Iterable[Callback], output_dir: Path, *, has_evaluation: bool
) -> None:
    """Let a `ModelCheckpoint` without a folder save beside the run's own checkpoints.

    There its folders belong to this run: they move aside with it, and a run that is resumed from
    one goes on as this run. `load_path: auto` looks at `global_step_N` alone.

    Args:
        callbacks: Those given under `trainer`.
        output_dir: The run directory.
        has_evaluation: Whether there is evaluation data.

    Raises:
        ConfigError: One of them asks for what cannot be here; all such problems.
    """
    problems: list[Problem] = []
    for callback in callbacks:
        problems += _problems(callback, has_evaluation=has_evaluation)
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(checkpoints_folder(output_dir).resolve())
    if problems:
        raise ConfigError.of(problems)


def _problems(callback: Callback, *, has_evaluation: bool) -> Iterator[Problem]:
    name = type(callback).__name__
    for kind, why, fix in REFUSED:
        if isinstance(callback, kind):
            yield Problem(KEY, f"{name} {why}", fix)
    if not isinstance(callback, EarlyStopping | ModelCheckpoint):
        return
    monitor = callback.monitor or ""
    if monitor.startswith("eval_") and not has_evaluation:
        what = f"{name} watches {monitor}, but data.eval_path is not given"
        yield Problem(KEY, what, "give data.eval_path, or watch another number such as loss")
    if isinstance(callback, EarlyStopping):
        return
    if callback.save_weights_only:
        what = f"{name} has save_weights_only: true, but checkpoints are saved whole"
        yield Problem(KEY, what, "leave it out; the export of a checkpoint holds weights alone")
    if callback.save_on_exception:
        yield Problem(KEY, f"{name} has save_on_exception: true, but {ALONE}", SAVE_STEPS)
