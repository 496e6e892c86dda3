"""The peers on transformers' Trainer: itself with padding, and TRL's SFTTrainer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from benchmarks.contestants.task import (
    BETAS,
    LR,
    ROWS_A_STEP,
    STEP_TOKENS,
    Meter,
    read_samples,
    read_tokenizer,
)


class MeterCallback(TrainerCallback):
    """Counts real tokens by what the collator made, and reads the clock at each step's end."""

    def __init__(self, num_steps: int) -> None:
        self.meter = Meter(num_steps)
        self.num_tokens = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.meter.step(self.num_tokens, float("nan"))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loss comes behind the step."""
        if "loss" in kwargs.get("logs", {}) and self.meter.losses:
            self.meter.losses[-1] = kwargs["logs"]["loss"]


class Counting:
    """A collator that counts the tokens that are not padding.

    Args:
        collate: The trainer's own.
        callback: Is told.
    """

    def __init__(self, collate: Any, callback: MeterCallback) -> None:
        self.collate, self.callback = collate, callback

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and count."""
        self.callback.num_tokens = sum(len(feature["input_ids"]) for feature in features)
        return self.collate(features)


class Samples(Dataset[dict[str, list[int]]]):
    """Tokenised conversations, cut to the length that all contestants have."""

    def __init__(self, folder: Path) -> None:
        self.samples = read_samples(folder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self.samples[index]
        return {"input_ids": ids[:STEP_TOKENS], "labels": labels[:STEP_TOKENS]}


def common(arguments: argparse.Namespace, *, rows: int) -> dict[str, Any]:
    """Settings that every trainer here gets."""
    return {
        "output_dir": str(arguments.out),
        "per_device_train_batch_size": rows,
        "max_steps": arguments.steps,
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": arguments.dtype == "bfloat16",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def run_trainer(arguments: argparse.Namespace, model: Any, callback: MeterCallback) -> Any:
    """Transformers' own Trainer over padded batches."""
    from transformers import DataCollatorForSeq2Seq, Trainer

    collate = DataCollatorForSeq2Seq(read_tokenizer(arguments.folder))
    return Trainer(
        model,
        TrainingArguments(**common(arguments, rows=ROWS_A_STEP)),
        data_collator=Counting(collate, callback),
        train_dataset=Samples(arguments.folder),
        callbacks=[callback],
    )


def run_trl(arguments: argparse.Namespace, model: Any, callback: MeterCallback) -> Any:
    """TRL's SFTTrainer, packed or not, with its own tokenising and masks."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    is_packed = arguments.name == "trl_packed"
    settings = SFTConfig(
        **common(arguments, rows=1 if is_packed else ROWS_A_STEP),
        max_length=STEP_TOKENS,
        assistant_only_loss=True,
        packing=is_packed,
        packing_strategy="bfd",
    )
    raw = datasets.load_dataset(
        "json",
        data_files=str(arguments.folder / "data.jsonl"),
        split="train",
        cache_dir=str(arguments.out / "cache"),
    )
    trainer = SFTTrainer(
        model,
        args=settings,
        train_dataset=raw,
        processing_class=read_tokenizer(arguments.folder),
        callbacks=[callback],
    )
    trainer.data_collator = Counting(trainer.data_collator, callback)
    return trainer


def main() -> None:
    """Train some steps and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["hf_trainer", "trl_packed", "trl"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model", dtype=torch.float32)
    callback = MeterCallback(arguments.steps)
    build = run_trainer if arguments.name == "hf_trainer" else run_trl
    build(arguments, model, callback).train()
    callback.meter.report()


if __name__ == "__main__":
    main()
