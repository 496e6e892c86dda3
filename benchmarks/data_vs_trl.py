"""Prepare one file of conversations as omnilit and as TRL do: tokens, masks, packing.

Run by `make bench`. CPU seconds are user and system of this process and all that it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from benchmarks.workload import cpu_seconds, make_tokenizer, read_words
from omnilit.data.cache import open_prepared
from omnilit.data.files import DataFile
from omnilit.data.packing import PlanSettings, make_generator, plan_pass
from omnilit.data.prepare import PrepareRequest, prepare
from omnilit.data.transforms import TransformSettings
from omnilit.data.warmup import BudgetSchedule

LENGTH = 2048


def write_file(file: Path, words: list[str], number: int) -> None:
    """Conversations whose lengths are spread like those of public chat data."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(number):
            messages = []
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                for role, scale in (("user", 20), ("assistant", 60)):
                    size = 1 + min(int(draw.lognormvariate(0, 0.9) * scale), 900)
                    start = draw.randrange(len(words) - size)
                    messages.append(
                        {"role": role, "content": " ".join(words[start : start + size])}
                    )
            lines.write(json.dumps({"messages": messages}) + "\n")


def ours(file: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[float, float]:
    """CPU seconds, and the share of padding of the first pass."""
    start = cpu_seconds()
    request = PrepareRequest(
        (DataFile(str(file), "jsonl"),), TransformSettings(max_seq_len=LENGTH), folder / "ours"
    )
    lengths = open_prepared(prepare(request, tokenizer)["path"]).lengths
    rng = make_generator(0, 0)
    settings = PlanSettings(0, BudgetSchedule(LENGTH))
    plan = plan_pass(lengths, rng.permutation(len(lengths)), settings, rng)
    return cpu_seconds() - start, 1 - int(lengths.sum()) / (plan.size * LENGTH)


def theirs(file: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[float, float]:
    """As `ours`, of TRL's own preparation: assistant masks, truncation, packing `bfd`."""
    import datasets
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    spent: list[float] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: object, **kwargs: object) -> object:
            start = cpu_seconds()
            prepared = super()._prepare_dataset(*args, **kwargs)
            spent.append(cpu_seconds() - start)
            return prepared

    raw = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(folder / "theirs")
    )
    settings = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=LENGTH,
        assistant_only_loss=True,
        packing=True,
        packing_strategy="bfd",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    tiny = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    trainer = Timed(
        Qwen3ForCausalLM(tiny), args=settings, train_dataset=raw, processing_class=tokenizer
    )
    packed = trainer.train_dataset
    tokens = sum(len(row) for row in packed["input_ids"])
    return sum(spent), 1 - tokens / (len(packed) * LENGTH)


def main() -> None:
    """Interleave the two and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    words = read_words()
    times: dict[str, list[float]] = {"omnilit": [], "trl": []}
    padding: dict[str, float] = {}
    runs: dict[str, Callable[..., tuple[float, float]]] = {"omnilit": ours, "trl": theirs}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "data.jsonl"
        write_file(file, words, arguments.records)
        tokenizer = make_tokenizer(words)
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                folder = Path(place) / "work"
                spent, padding[name] = run(file, tokenizer, folder)
                times[name].append(spent / arguments.records * 1000)
                shutil.rmtree(folder, ignore_errors=True)
    median = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        shown = " ".join(f"{value:.3f}" for value in found)
        sys.stdout.write(
            f"{name:8} CPU s / 1,000 records: {median[name]:.3f} ({shown})  "
            f"padding {100 * padding[name]:.3f} %\n"
        )
    ratio = median["omnilit"] / median["trl"]
    sys.stdout.write(f"ratio of the medians {ratio:.2f}, {arguments.records} records\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
