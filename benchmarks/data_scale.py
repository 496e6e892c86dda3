"""Prepare millions of short records: memory over time, and the first step on a warm cache.

Run by `make bench`. Memory is RssAnon of the training process and, apart, of its largest worker;
what the kernel may drop (mapped files) does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from transformers import Qwen3Config

from benchmarks.workload import descendants, make_tokenizer, read_words

EVERY_S = 2.0
STARTED_MIB = 20.0  # of a worker that has imported what it needs
MIB = 1024.0  # /proc counts in KiB


def write_records(file: Path, words: list[str], number: int) -> None:
    """Conversations of one short question and answer."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(number):
            said = [" ".join(draw.sample(words, draw.randint(3, 12))) for _ in range(2)]
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), said, strict=True)
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def write_task(folder: Path, number: int) -> Path:
    """A tiny model, its tokenizer, the records and a configuration."""
    words = read_words()
    tokenizer = make_tokenizer(words)
    model = folder / "model"
    tokenizer.save_pretrained(model)
    Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    ).save_pretrained(model)
    write_records(folder / "data.jsonl", words, number)
    config = {
        "model": {"config_path": str(model), "tokenizer_path": str(model)},
        "data": {"train_path": str(folder / "data.jsonl"), "train_size": None},
        "train": {"max_steps": 1, "checkpoint": {"save_epochs": 0, "save_hf_weights": False}},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def anonymous_mib(process: int) -> float:
    """RssAnon of a process; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) / MIB if found else 0.0


def run(config: Path, out: Path, log: Path) -> tuple[float, float, list[tuple[float, float]]]:
    """One run to its first step.

    Returns:
        Seconds to the first step, and to the end; MiB of the process and of its largest worker,
        every `EVERY_S` seconds.
    """
    samples: list[tuple[float, float]] = []
    words = ["fit", str(config), "--train.checkpoint.output_dir", str(out)]
    environment = {**os.environ, "OMNILIT_CACHE": str(config.parent / "cache")}
    began, first = time.monotonic(), 0.0
    with log.open("w", encoding="utf-8") as written:
        command = [sys.executable, "-m", "omnilit", *words]
        process = subprocess.Popen(command, env=environment, stderr=written)
        next_sample = 0.0
        while process.poll() is None:
            time.sleep(0.1)
            if not first and "\nstep 1/" in log.read_text(encoding="utf-8"):
                first = time.monotonic() - began
            if time.monotonic() - began >= next_sample:
                next_sample += EVERY_S
                workers = [anonymous_mib(child) for child in descendants(process.pid)]
                samples.append((anonymous_mib(process.pid), max(workers, default=0.0)))
    if process.returncode:
        sys.stderr.write(log.read_text(encoding="utf-8"))
        raise SystemExit(process.returncode)
    return first, time.monotonic() - began, samples


def main() -> None:
    """A cold and a warm run, and a table of memory over time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=2_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = write_task(folder, arguments.records)
        first, _, samples = run(config, folder / "cold", folder / "cold.log")
        warm, _, _ = run(config, folder / "warm", folder / "warm.log")
    sys.stdout.write(f"{arguments.records} records; cold cache: first step after {first:.0f} s\n")
    # Imports are over once the largest worker has its own memory: that is the start.
    start = next(i for i, (_, worker) in enumerate(samples) if worker > STARTED_MIB)
    begun = samples[start:]
    sys.stdout.write("share of the run  process MiB  largest worker MiB\n")
    for tenth in range(11):
        own, worker = begun[min(tenth * len(begun) // 10, len(begun) - 1)]
        sys.stdout.write(f"{tenth * 10:15d}%  {own:11.0f}  {worker:18.0f}\n")
    largest, most = (max(column) for column in zip(*begun, strict=True))
    sys.stdout.write(
        f"growth of the process {largest - begun[0][0]:.0f} MiB, "
        f"of a worker {most - begun[0][1]:.0f} MiB\n"
        f"warm cache: first step after {warm:.0f} s\n"
    )


if __name__ == "__main__":
    main()
