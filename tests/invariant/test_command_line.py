"""Configurations of the axes, through the command line: two processes train the steps of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED_AT, KILLED_AT = 10, 4, 6
CONSTANT = ("--train.optimizer.lr_decay_style", "constant")  # so that any end has the same steps
FP32 = ("--train.accelerator.fsdp_config.mixed_precision.enable", "false")
SIZES = {
    "moe_ep": "ep_size",
    "ulysses": "ulysses_size",
    "context": "cp_size",
    "tensor": "tp_size",
    "pipeline": "pp_size",
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the configurations find what they name."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "configs").symlink_to(ROOT / "configs")
    example = [sys.executable, str(ROOT / "examples" / "stdlib_docs.py")]
    out = str(folder / "demo_output" / "data")
    subprocess.run([*example, "--out", out], check=True, capture_output=True)
    return folder


def command(config: str, out: Path, num_processes: int, **accelerator: object) -> list[str]:
    words = [sys.executable, "-m", "omnilit", "fit", f"configs/text/{config}.yaml", *FP32]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", str(num_processes)]
    words += ["--train.max_steps", str(STEPS), "--train.checkpoint.output_dir", str(out)]
    for name, value in accelerator.items():
        words += [f"--train.accelerator.{name}", str(value).lower()]
    return words


def environment(folder: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMNILIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def fit(folder: Path, words: list[str]) -> None:
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def read_lines(out: Path) -> Lines:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_lines(found: Lines, expected: Lines) -> float:
    """The steps are the same; returns how far the losses lie apart at most."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (mine["step"], key)
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("config", SIZES)
def test_two_processes_train_what_the_configuration_says(config, folder, tmp_path, capsys):
    fit(folder, command(config, tmp_path / "two", 2))
    fit(folder, command(config, tmp_path / "one", 1, **{SIZES[config]: 1}))
    found, expected = read_lines(tmp_path / "two"), read_lines(tmp_path / "one")
    assert len(found) == STEPS
    far = check_lines(found, expected)
    with capsys.disabled():
        last = f"{found[-1]['loss']:.6f} on two processes, {expected[-1]['loss']:.6f} on one"
        sys.stdout.write(f"\n{config}: loss of step {STEPS} {last}, at most {far:.1e} apart\n")


def train_until_killed(folder: Path, out: Path) -> Lines:
    """Four processes, experts in halves, killed behind a save with no chance to clean up."""
    words = [*command("moe_ep", out, 4), *CONSTANT, "--train.max_steps", "1000"]
    words += ["--train.checkpoint.save_steps", str(SAVED_AT)]
    with (out.parent / "log").open("w") as log:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if len(read_lines(out)) >= KILLED_AT:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(read_lines(out)) >= KILLED_AT, (out.parent / "log").read_text()
    return read_lines(out)


def test_a_killed_run_of_four_processes_goes_on_on_two_and_on_one(folder, tmp_path):
    fit(folder, [*command("moe_ep", tmp_path / "undisturbed", 1, ep_size=1), *CONSTANT])
    expected = read_lines(tmp_path / "undisturbed")
    seen = train_until_killed(folder, tmp_path / "killed")
    check_lines(seen[:STEPS], expected[: len(seen)])
    # a later save may have been published before the processes were gone
    for later in (tmp_path / "killed" / "checkpoints").iterdir():
        if later.name != f"global_step_{SAVED_AT}":
            shutil.rmtree(later)
    for num_processes in (2, 1):
        out = tmp_path / f"resumed_{num_processes}"
        shutil.copytree(tmp_path / "killed", out)
        words = command("moe_ep", out, num_processes, ep_size=num_processes)
        fit(folder, [*words, *CONSTANT, "--train.checkpoint.load_path", "auto"])
        check_lines(read_lines(out), expected)
        assert f"global_step_{SAVED_AT}" in {p.name for p in (out / "checkpoints").iterdir()}
