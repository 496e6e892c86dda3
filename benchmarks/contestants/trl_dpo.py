"""TRL's DPOTrainer on the tokens, in the order, that another run had."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from benchmarks.contestants.hf import Counting, MeterCallback, common
from benchmarks.contestants.task import ORDER, STEP_TOKENS, read_tokenizer


class Tokenised(DPOTrainer):
    """Takes data whose tokens are there already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class CountingPairs(Counting):
    """A collator that counts the tokens of both sequences of each pair."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and count."""
        sizes = [
            2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
            for pair in features
        ]
        self.callback.num_tokens = sum(sizes)
        return self.collate(features)


def read_pairs(folder: Path, rows: list[int]) -> list[dict[str, list[int]]]:
    """Tokens of the pairs in these 1-based lines, by plain transformers; trained tokens alone.

    What follows the answer's end token is trained by nobody and left out.
    """
    tokenizer = read_tokenizer(folder)
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()

    def split(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        encoded: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        start, stop = mask.index(1), len(mask) - mask[::-1].index(1)
        return ids[:start], ids[start:stop]

    found = []
    for row in rows:
        pair = json.loads(lines[row - 1])
        (prompt, chosen), (_, rejected) = split(pair["chosen"]), split(pair["rejected"])
        found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return found


def main() -> None:
    """Train some steps and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, required=True, help="of a step")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = json.loads((arguments.folder / ORDER).read_text(encoding="utf-8"))
    callback = MeterCallback(arguments.steps)
    settings = common(arguments, rows=arguments.pairs)
    del settings["activation_checkpointing"]
    trainer = Tokenised(
        AutoModelForCausalLM.from_pretrained(arguments.folder / "model", dtype=torch.float32),
        args=DPOConfig(
            **settings | {"learning_rate": arguments.lr},
            gradient_checkpointing=False,
            max_length=STEP_TOKENS,
            train_sampling_strategy="sequential",
        ),
        train_dataset=datasets.Dataset.from_list(read_pairs(arguments.folder, rows)),
        processing_class=read_tokenizer(arguments.folder),
        callbacks=[callback],
    )
    trainer.data_collator = CountingPairs(trainer.data_collator, callback)
    trainer.train()
    callback.meter.report()


if __name__ == "__main__":
    main()
