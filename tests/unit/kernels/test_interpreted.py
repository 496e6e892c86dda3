"""Triton's kernels under its interpreter, in a process of its own: see the folder `interpreted`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((Path(__file__).parent / "interpreted").glob("*.py"))


def run_interpreted(*arguments: str) -> None:
    """Run the tests of the folder `interpreted` in a process whose kernels are interpreted."""
    names = [str(file.relative_to(ROOT)) for file in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *names]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.timeout(400)  # some seconds, unless the machine is busy
def test_triton_kernels_compute_what_their_references_do():
    run_interpreted()
