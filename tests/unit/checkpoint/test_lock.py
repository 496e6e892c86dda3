import json
import os
import subprocess
import sys

import pytest

from omnilit.checkpoint.lock import RunLock
from omnilit.errors import ConfigError


def test_a_second_run_is_refused_with_the_owner(tmp_path):
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
        RunLock(tmp_path).acquire()


def test_a_released_lock_is_free(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path):
            owner = json.loads((tmp_path / "run.lock").read_text())
            assert owner["pid"] == os.getpid()


def test_a_lock_of_a_killed_run_is_stale(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from omnilit.checkpoint.lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert (tmp_path / "run.lock").exists()
    with RunLock(tmp_path):
        pass
