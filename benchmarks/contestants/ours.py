"""omnilit, by its command line, with a callback that reads the clock."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants.task import BETAS, LR, ORDER, STEP_TOKENS, Meter


def main() -> None:
    """Train some steps and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments, more = parser.parse_known_args()
    model, steps = str(arguments.folder / "model"), arguments.steps
    words = [
        "fit",
        "--model.model_path", model,
        "--data.train_path", str(arguments.folder / "data.jsonl"),
        "--data.max_seq_len", str(STEP_TOKENS),
        "--data.dataloader.num_workers", "0",
        "--train.max_steps", str(steps),
        "--train.optimizer.lr", str(LR),
        "--train.optimizer.betas", str(list(BETAS)),
        "--train.gradient_checkpointing.enable", "false",
        "--train.accelerator.fsdp_config.mixed_precision.param_dtype", arguments.dtype,
        "--train.checkpoint.output_dir", str(arguments.out),
        "--train.checkpoint.save_epochs", "0",
        "--train.checkpoint.save_hf_weights", "false",
        "--trainer.callbacks", "benchmarks.contestants.ours.MeterCallback",
        *([] if "--train.dyn_bsz" in more else ["--data.train_size", "null"]),
        *more,
    ]  # fmt: skip
    from omnilit.__main__ import main as run

    code = run(words)
    if code:
        sys.exit(code)


def __getattr__(name: str) -> Any:
    """The callback, made when Lightning is imported anyway: the start-up is measured too."""
    if name != "MeterCallback":
        raise AttributeError(name)
    from lightning.pytorch import Callback, LightningModule, Trainer

    class MeterCallback(Callback):
        def __init__(self) -> None:
            self.meter = Meter(0)
            self.rows: list[int] = []  # the line of every other sequence: of pairs, each once

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            result: Any = pl_module.step_result
            self.meter.step(result.num_tokens, result.loss)
            self.rows += [origin.row for origin in args[1].origins[::2]]

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.meter.report()
            if order := os.environ.get(ORDER):
                Path(order).write_text(json.dumps(self.rows), encoding="utf-8")

    return MeterCallback


if __name__ == "__main__":
    main()
