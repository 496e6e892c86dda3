from __future__ import annotations

import os
import subprocess
import sys

import pytest

from omnilit.parallel.host_memory import SETTINGS, keep_freed_blocks

FAULTS = """
import ctypes, resource, sys
from omnilit.parallel.host_memory import keep_freed_blocks
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use():
    block = libc.malloc(48 << 20)
    libc.memset(block, 1, 48 << 20)
    libc.free(block)
if sys.argv[1] == "kept":
    assert keep_freed_blocks()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_freed_block_is_used_again_without_new_pages():
    assert 4 * faults("kept") < faults("as ever")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_chooses_stays(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_blocks()


def test_another_c_library_is_left_alone(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_blocks()
