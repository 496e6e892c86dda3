import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from omnilit.checkpoint.lock import RunLock
from omnilit.errors import ConfigError

TAKE = (
    "import os, signal, sys\n"
    "from pathlib import Path\n"
    "from omnilit.checkpoint.lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1]))\n"
    "lock.acquire()\n"
)
WAIT = "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.read()\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)\n"


@contextmanager
def running(code, folder):
    """Another process that has run `code` up to its `WAIT`; it ends with the block."""
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process


def test_a_second_run_is_refused_with_the_owner(tmp_path):
    with running(TAKE + WAIT, tmp_path) as other:
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .* wait for that"):
            RunLock(tmp_path).acquire()
        owner = json.loads((tmp_path / "run.lock").read_text())
        assert owner["pid"] == other.pid


def test_a_released_lock_is_free_while_its_process_lives(tmp_path):
    with running(TAKE + "lock.release()\n" + WAIT, tmp_path), RunLock(tmp_path):
        owner = json.loads((tmp_path / "run.lock").read_text())
        assert owner["pid"] == os.getpid()


def test_a_lock_of_a_killed_run_is_stale(tmp_path):
    done = subprocess.run([sys.executable, "-c", TAKE + DIE, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert (tmp_path / "run.lock").exists()
    with RunLock(tmp_path):
        pass


def test_a_forked_worker_that_outlives_its_killed_run_does_not_hold_the_lock(tmp_path):
    fork = f"if os.fork() == 0:\n    {WAIT}else:\n    {DIE}"
    with running(TAKE + fork, tmp_path) as run:
        assert run.wait(timeout=10) == -9
        with RunLock(tmp_path):
            pass
