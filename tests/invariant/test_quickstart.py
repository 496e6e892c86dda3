"""The quickstart's first steps, whole and real: too long for every run of the suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(folder: Path, num_processes: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The first steps of the quickstart in fp32, and the weights before them."""
    out = folder / f"run_{num_processes}"
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    text = yaml.safe_dump(config).replace("demo_output/data", str(folder / "data"))
    config = yaml.safe_load(text)
    config["train"]["checkpoint"]["output_dir"] = str(out)
    config["train"]["checkpoint"]["save_hf_weights"] = False
    config["train"]["accelerator"]["fsdp_config"]["mixed_precision"] = {"enable": False}
    stop = {"steps": STEPS, "weights": str(folder / f"weights_{num_processes}.pt")}
    config["trainer"] = {
        "accelerator": "cpu",
        "devices": num_processes,
        "callbacks": [{"class_path": "tests.helpers.stop.StopAfter", "init_args": stop}],
    }
    file = folder / f"{num_processes}.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMNILIT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "omnilit", "fit", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, torch.load(stop["weights"], weights_only=True)


def test_the_first_steps_are_the_same_on_one_process_and_on_two(tmp_path, capsys):
    example = [sys.executable, str(ROOT / "examples" / "stdlib_docs.py")]
    subprocess.run([*example, "--out", str(tmp_path / "data")], check=True, capture_output=True)
    (one, weights), (two, others) = run(tmp_path, 1), run(tmp_path, 2)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert len(one) == len(two) == STEPS
    differences = {
        key: max(abs(a[key] - b[key]) for a, b in zip(one, two, strict=True))
        for key in ("loss", "grad_norm")
    }
    with capsys.disabled():
        sys.stdout.write(f"\n{STEPS} steps on 1 and 2 processes: weights equal, {differences}\n")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert max(differences.values()) < 1e-5
