"""The same command twice, on two processes and with compiled blocks: equal to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 12
TIMES = (
    "step_time_s",
    "data_wait_s",
    "tokens_per_second",
    "tflops_per_second",
    "max_memory_gib",
    "mfu",
)


def run(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, str], str]:
    """The metrics without what a clock says, a hash of every exported file, and the log."""
    out = folder / name
    config = {
        "model": {"config_path": str(folder / "model")},
        "data": {"train_path": str(folder / "train.jsonl"), "max_seq_len": 64},
        "train": {
            "global_batch_size": 4,
            "max_steps": STEPS,
            "enable_full_determinism": True,
            "enable_compile": True,
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"output_dir": str(out)},
        },
        "trainer": {"accelerator": "cpu", "devices": 2},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"},
        "OMNILIT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor_{name}"),
    }
    command = [sys.executable, "-m", "omnilit", "fit", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    exported = out / "checkpoints" / f"global_step_{STEPS}" / "hf_ckpt"
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in exported.glob("*.safetensors")
    }
    return metrics, hashes, done.stderr


def test_two_runs_of_one_command_are_equal_to_the_bit(tmp_path, capsys):
    training.write_model(tmp_path / "model", attention_dropout=0.1)
    training.write_conversations(tmp_path / "train.jsonl", 80)
    (first, hashes, log), (second, others, _) = run(tmp_path, "one"), run(tmp_path, "two")
    with capsys.disabled():
        sys.stdout.write(
            f"\n{STEPS} steps on 2 processes, twice, in bf16 with dropout and compiled blocks:\n"
            f"last step {first[-1]['loss']!r} and {second[-1]['loss']!r}, weights {hashes}\n"
            f"and {others}\n"
        )
    assert "compile: 2 blocks run as" in log
    assert "PYTHONHASHSEED" not in log
    assert len(first) == STEPS
    assert first == second
    assert hashes
    assert hashes == others
