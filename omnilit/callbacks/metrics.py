"""What every step came to, as a line of `metrics.jsonl` and to the loggers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from omnilit.callbacks.checkpointing import CheckpointSaver
from omnilit.callbacks.confusion import NAME as CONFUSION
from omnilit.callbacks.evaluation import EvaluationSchedule, is_evaluation_due
from omnilit.callbacks.expert_load import ExpertLoad
from omnilit.callbacks.layer_norms import LayerGradNorms
from omnilit.callbacks.metrics_file import MetricsFile, Number, append_lines
from omnilit.callbacks.peak_memory import PeakMemory
from omnilit.callbacks.profiler import StepProfiler
from omnilit.callbacks.protocols import TrainedModule
from omnilit.callbacks.trainer_view import callbacks_of_type, is_trial_run
from omnilit.checkpoint.layout import METRICS
from omnilit.checkpoint.together import run_together
from omnilit.kernels.machine import Machine
from omnilit.kernels.peaks import peak_flops
from omnilit.logging import get_logger
from omnilit.parallel.collectives import max_over
from omnilit.types import StepResult

log = get_logger(__name__)
EMPTY: Final[Mapping[str, list[list[int]]]] = MappingProxyType({})


class MetricsRecorder(Callback):
    """Write one line a step, before the step is saved and before the next one begins.

    A step's line waits for the evaluation that is due at it and holds its numbers. So a
    checkpoint of step N never exists without the line of step N, unless an evaluation was cut
    off. `validate` writes `eval.jsonl` instead, one line an evaluation. A `fast_dev_run` writes
    neither.

    Stands before the progress bar and `EvaluationSchedule` in the trainer's list.

    Args:
        output_dir: Folder of the run.
        machine: Whose peak `mfu` is a share of; default: the one that runs this.

    Attributes:
        numbers: Those of the newest step, by the names of `metrics.jsonl`; empty before the
            first. Times are rank 0's, `data_wait_s` and `max_memory_gib` the largest rank's.
            `step_time_s` runs from the end of the step before, its evaluation, save and
            profiler's trace excluded.
    """

    def __init__(self, output_dir: str | Path, *, machine: Machine | None = None) -> None:
        self.output_dir = Path(output_dir)
        self._machine = machine
        self._peak: float | None = None
        self._memory = PeakMemory(torch.device("cpu"))
        self.numbers: dict[str, Number] = {}
        self._file = MetricsFile(self.output_dir / METRICS)
        self._is_pending = False
        self._done_step = 0
        self._ended_at = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.numbers, self._is_pending = {}, False
        self._done_step = trainer.global_step
        self._ended_at = time.monotonic()
        device = trainer.strategy.root_device
        self._peak = peak_flops(self._machine or Machine.detect(device.type))
        self._memory = PeakMemory(device)
        if not is_trial_run(trainer):
            run_together(
                lambda: self._file.open_at(trainer.global_step),
                name=f"opening {self._file.path}",
                on_first=True,
            )
        self._memory.reset()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        result = cast("TrainedModule", pl_module).step_result
        if trainer.global_step == self._done_step or result is None:
            return  # a micro-batch inside a window
        self._done_step = trainer.global_step
        self.numbers = self._collect(trainer, result)
        self._ended_at = time.monotonic()
        self._is_pending = True
        if not is_evaluation_due(trainer):
            self._write(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("TrainedModule", pl_module)
        evaluated, confusion = module.eval_result or {}, module.eval_confusion
        more = {} if confusion is None else {CONFUSION: confusion.counts}
        if trainer.state.fn == TrainerFn.VALIDATING:
            if not _is_writer(trainer):
                return
            line = {"checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None}
            append_lines(self.output_dir / "eval.jsonl", [line | evaluated | more])
            log.info("  ".join(f"{name} {value:.4f}" for name, value in evaluated.items()))
        elif self._is_pending:
            self.numbers |= evaluated
            self._write(trainer, more)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._is_pending:  # the step was done, only its evaluation was not
            self._write(trainer)
        self._file.close()

    def _write(self, trainer: Trainer, more: Mapping[str, list[list[int]]] = EMPTY) -> None:
        self._is_pending = False
        if not _is_writer(trainer):
            return
        self._file.append({**self.numbers, **more})
        logged = {key: value for key, value in self.numbers.items() if key != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=int(self.numbers["step"]))

    def _collect(self, trainer: Trainer, result: StepResult) -> dict[str, Number]:
        step_time_s = time.monotonic() - self._step_began_at(trainer)
        device = trainer.strategy.root_device
        largest = max_over(
            {"data_wait_s": result.data_wait_s, "max_memory_gib": self._memory.read_gib()},
            device=device,
        )
        self._memory.reset()
        terms = result.losses if len(result.losses) > 1 else {}
        return {
            "step": result.step,
            "epoch": result.epoch,
            "loss": result.loss,
            **{f"loss/{name}": value for name, value in terms.items()},
            **result.shown,
            "grad_norm": result.grad_norm,
            **_by_layer(trainer, result.step),
            **_by_expert(trainer, result.step),
            "lr": next(iter(result.lr.values())),
            **{f"lr/{group}": value for group, value in result.lr.items()},
            "tokens": result.tokens,
            **_by_source(result),
            "tokens_per_second": result.num_tokens / max(step_time_s, 1e-9),
            **self._speed(result.flops, max(step_time_s, 1e-9), trainer.world_size),
            "step_time_s": step_time_s,
            **largest,
            "skipped_steps": result.skipped_steps,
        }

    def _speed(self, flops: float | None, step_time_s: float, num_ranks: int) -> dict[str, Number]:
        """Operations a second of all ranks, and their share of what the devices do at best."""
        if flops is None:
            return {}
        speed = flops / step_time_s
        share = {} if self._peak is None else {"mfu": speed / (self._peak * num_ranks)}
        return {"tflops_per_second": speed / 1e12, **share}

    def _step_began_at(self, trainer: Trainer) -> float:
        """When the work that belongs to no step, such as saving, was last over."""
        ends = [self._ended_at]
        for kind in (EvaluationSchedule, CheckpointSaver, StepProfiler):
            ends += [callback.finished_at for callback in callbacks_of_type(trainer, kind)]
        return max(ends)


def _by_source(result: StepResult) -> dict[str, Number]:
    """Tokens and loss of each data source; a source without a token in the step has no loss."""
    numbers: dict[str, Number] = {}
    for name, tokens in result.source_tokens.items():
        numbers[f"source/{name}/tokens"] = tokens
        if name in result.source_losses:
            numbers[f"source/{name}/loss"] = result.source_losses[name]
    return numbers


def _by_layer(trainer: Trainer, step: int) -> dict[str, Number]:
    """Gradient norms of the decoder blocks, at the steps where `LayerGradNorms` reads them."""
    return {
        f"grad_norm/{name}": norm
        for callback in callbacks_of_type(trainer, LayerGradNorms)
        if callback.step == step
        for name, norm in callback.norms.items()
    }


def _by_expert(trainer: Trainer, step: int) -> dict[str, Number]:
    """The experts' load, at the steps where `ExpertLoad` reads it."""
    return {
        f"expert_load/{name}": number
        for callback in callbacks_of_type(trainer, ExpertLoad)
        if callback.step == step
        for name, number in callback.numbers.items()
    }


def newest_numbers(trainer: Trainer) -> dict[str, Number]:
    """The newest step's numbers, from the trainer's `MetricsRecorder`; empty without one."""
    recorders = callbacks_of_type(trainer, MetricsRecorder)
    return recorders[0].numbers if recorders else {}


def _is_writer(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not is_trial_run(trainer)
