"""Preference optimisation beside TRL's DPOTrainer: the same pairs in the same order, in one run.

CPU seconds per 1,000 real tokens come first: cores may be shared, and wall time on them means
little. Losses are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benchmarks.contestants.task import ORDER, write_task
from benchmarks.train_speed import run_contestant, table

RATE: Final = 1e-6  # of the usual size for preferences


def write_pairs(folder: Path) -> None:
    """Of each conversation a pair: its own answer, and the next one's as the rejected one."""
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["messages"] for line in lines]
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for talk, other in pairwise(talks):
            file.write(json.dumps({"chosen": talk, "rejected": [talk[0], other[1]]}) + "\n")


def main() -> None:
    """Interleave both and print the tables and the largest difference of a step's loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=4, help="of a step")
    parser.add_argument("--records", type=int, default=200)
    arguments = parser.parse_args()
    ours = [
        "benchmarks.contestants.ours",
        *("--data.data_type", "dpo"),
        *("--train.dyn_bsz", "false"),
        *("--train.micro_batch_size", str(arguments.pairs)),
        *("--dpo_config.refer_model_precision", "float32"),
        *("--train.optimizer.lr", str(RATE)),
    ]
    trl = ["benchmarks.contestants.trl_dpo", "--pairs", str(arguments.pairs), "--lr", str(RATE)]
    results: dict[str, list[dict[str, Any]]] = {"omnilit": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.mkdir()
        write_task(task, num_records=arguments.records, model_name="dense")
        write_pairs(task)
        for _ in range(arguments.repeats):
            for name, command in (("omnilit", ours), ("trl", trl)):  # ours writes the order
                with tempfile.TemporaryDirectory() as place:
                    found = run_contestant(
                        name,
                        command,
                        task,
                        Path(place),
                        dtype="float32",
                        steps=arguments.steps,
                        environment={ORDER: str(task / ORDER)},
                    )
                results[name].append(found)
                sys.stderr.write(f"{name} {json.dumps(found)}\n")
    sys.stdout.write(table(results) + "\n")
    first, second = (results[name][0]["losses"] for name in ("omnilit", "trl"))
    apart = max(abs(a - b) for a, b in zip(first, second, strict=True))
    sys.stdout.write(f"loss of {len(first)} steps: at most {apart:.1e} apart\n")


if __name__ == "__main__":
    main()
