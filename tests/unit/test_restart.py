import os
import subprocess
import sys

from omnilit.__main__ import TARGETS, main
from omnilit.errors import RestartError

PROGRAM = f"""
import os, sys
from omnilit.__main__ import run_process
from omnilit.errors import RestartError

def run(words):
    print(os.getpid(), os.environ.get("PYTHONHASHSEED"), hash("a"), *words, flush=True)
    if "PYTHONHASHSEED" not in os.environ:
        raise RestartError(key="train.a", environment={{"PYTHONHASHSEED": "7"}})
    return 3

module = type(sys)("stub")
module.run = run
sys.modules[{TARGETS["env"]!r}] = module
run_process()
"""


def test_a_process_that_must_starts_again_as_itself_with_the_variables():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    command = [sys.executable, "-c", PROGRAM, "env", "--word", "two words"]
    done = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [process.returncode for process in done] == [3, 3], done[0].stderr
    (first, second), (_, other) = (process.stdout.splitlines() for process in done)
    pid, seed, _, *words = first.split()
    assert (seed, words) == ("None", ["--word", "two", "words"])
    assert second.split()[:2] == [pid, "7"]
    assert second.split()[2:] == other.split()[2:]  # the same hash in every process


def test_called_as_a_function_it_says_what_to_set(monkeypatch, capsys):
    def run(words):
        raise RestartError(key="train.a", environment={"PYTHONHASHSEED": "7"})

    module = type(sys)("stub_of_a_verb")
    module.run = run
    monkeypatch.setitem(sys.modules, TARGETS["env"], module)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == (
        "error: 1 problem\n  - train.a: PYTHONHASHSEED must be set before Python starts. To fix: "
        "start it with PYTHONHASHSEED=7.\n"
    )
