"""The same fine-tune with omnilit, its peers and a hand-written loop, interleaved in one run.

Run by `make bench`. CPU seconds per 1,000 real tokens come first: cores may be shared, and wall
time on them means little. Ratios are of the medians; above 1 omnilit is better.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from benchmarks.contestants.task import MODELS, STARTED, WARM_UP, write_task

EXPERTS: Final = (
    "--imports",
    '["benchmarks.contestants.transformers_experts"]',
    "--model.ops_implementation.moe_implementation",
)
# `omnilit_` and a name: our trainer over transformers' own experts of that name, in a mixture alone
CONTESTANTS: Final = {
    "omnilit": ["benchmarks.contestants.ours"],
    "omnilit_eager": ["benchmarks.contestants.ours", *EXPERTS, "eager"],
    "omnilit_grouped_mm": ["benchmarks.contestants.ours", *EXPERTS, "transformers_grouped_mm"],
    "loop": ["benchmarks.contestants.loop"],
    "trl_packed": ["benchmarks.contestants.hf", "trl_packed"],
    "trl": ["benchmarks.contestants.hf", "trl"],
    "hf_trainer": ["benchmarks.contestants.hf", "hf_trainer"],
}
FIELD: Final = {
    "dense": ["omnilit", "loop", "trl_packed", "trl", "hf_trainer"],
    "moe": ["omnilit", "omnilit_grouped_mm", "omnilit_eager", "trl_packed"],
}
FIGURES: Final = {
    "cpu_s_per_1k": "CPU s / 1,000 tokens",
    "wall_s_per_1k": "wall s / 1,000 tokens",
    "first_step_s": "s to the first step",
    "peak_gib": "peak GiB",
}
Results = dict[str, list[dict[str, Any]]]


def usual_dtypes() -> list[str]:
    """Both, or float32 alone where the CPU has no instructions for bfloat16.

    torch's own products then take a hundred times as long as in float32, so that peers would need
    hours for what says nothing about them. `--dtypes bfloat16` measures it all the same.
    """
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    if {"avx512_bf16", "amx_bf16"} & set(flags):
        return ["bfloat16", "float32"]
    sys.stderr.write("bfloat16 is left out: this CPU has no instructions for it\n")
    return ["float32"]


def run(name: str, task: Path, place: Path, *, dtype: str, steps: int) -> dict[str, Any]:
    """One contestant, once, in a process of its own."""
    return run_contestant(name, CONTESTANTS[name], task, place, dtype=dtype, steps=steps)


def run_contestant(
    name: str,
    words: Sequence[str],
    task: Path,
    place: Path,
    *,
    dtype: str,
    steps: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """A module with its arguments, once, in a process of its own."""
    command = [sys.executable, "-m", *words, "--dtype", dtype]
    command += ["--steps", str(steps), "--folder", str(task)]
    if name != "loop":
        command += ["--out", str(place / name)]
    variables = {
        **os.environ,
        **environment,
        "OMP_WAIT_POLICY": "passive",
        "OMNILIT_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        STARTED: str(time.time()),
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
        raise SystemExit(f"{name} failed with {done.returncode}")
    return json.loads(found[-1].removeprefix("RESULT "))


def table(results: Results) -> str:
    """Minimum, median and maximum of each figure, and the ratio to omnilit's median."""
    lines = []
    for figure, title in FIGURES.items():
        ours = statistics.median(one[figure] for one in results["omnilit"])
        lines.append(f"| {title} | min | median | max | beside omnilit |\n|---|---|---|---|---|")
        for name, runs in results.items():
            values = sorted(one[figure] for one in runs)
            median = statistics.median(values)
            shown = " | ".join(f"{value:.2f}" for value in (values[0], median, values[-1]))
            lines.append(f"| {name} | {shown} | {median / ours:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Interleave the contestants and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=WARM_UP + 5)
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--dtypes", nargs="+", default=usual_dtypes())
    parser.add_argument("--model", choices=list(MODELS), default="dense")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.mkdir()
        write_task(task, num_records=arguments.records, model_name=arguments.model)
        names = arguments.only or FIELD[arguments.model]
        for dtype in arguments.dtypes:
            results: Results = {name: [] for name in names}
            for _ in range(arguments.repeats):
                for name in names:
                    with tempfile.TemporaryDirectory() as place:
                        found = run(name, task, Path(place), dtype=dtype, steps=arguments.steps)
                    results[name].append(found)
                    sys.stderr.write(f"{dtype} {name} {json.dumps(found)}\n")
            sys.stdout.write(f"{dtype}, {arguments.steps - WARM_UP} steps counted\n\n")
            sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
