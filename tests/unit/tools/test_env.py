import platform

import pytest
import torch

import omnilit
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import table_of_backends
from omnilit.tools.env import machine_rows, report, run, version_rows

MESH = ["--config", "a.yaml", "--world-size", "8"]


def test_versions_are_those_that_run():
    rows = dict(version_rows())
    assert rows["omnilit"] == omnilit.__version__
    assert rows["python"] == platform.python_version()
    assert rows["torch"] == torch.__version__


def test_missing_package_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr("omnilit.tools.env.PACKAGES", ("no-such-package",))
    assert dict(version_rows())["no-such-package"] == "not installed"


def test_threads_and_their_variable_are_shown(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    rows = dict(machine_rows(Machine()))
    assert rows["OMP_NUM_THREADS"] == "3"
    assert rows["threads of torch"] == str(torch.get_num_threads())


def test_fast_bfloat16_names_the_cpu_feature():
    fast = Machine(cpu_features=frozenset({"avx512_bf16"}))
    assert dict(machine_rows(fast))["fast bfloat16"] == "yes (avx512_bf16)"
    assert dict(machine_rows(Machine()))["fast bfloat16"] == "no"


def test_report_holds_every_kernel_with_what_it_lacks():
    lines = [" ".join(line.split()) for line in report(Machine()).splitlines()]
    rows = table_of_backends(Machine())
    assert rows
    assert all(" ".join(" ".join(row).split()) in lines for row in rows)


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_reasons_are_wrapped_and_none_is_lost(width):
    wide, narrow = report(Machine()), report(Machine(), width=width)
    table = narrow[narrow.index("\nkernels\n") :].splitlines()
    assert max(map(len, table)) <= width
    assert sorted(wide.split()) == sorted(narrow.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--verbose"], "--verbose: without a configuration env takes no arguments"),
        (["--world-size", "8"], "--world-size: without a configuration env takes no arguments"),
        (["--config", "a.yaml"], "--world-size: is not given. To fix: give the number of ranks."),
        (["--config", "a.yaml", "--world-size", "0"], "--world-size: 0 is no number of ranks"),
        (["--config", "a.yaml", "--world-size"], "--world-size: needs one value"),
        (["--rehearse"], "--rehearse: without a configuration env takes no arguments"),
        ([*MESH, "--rehearse", "yes"], "--rehearse: takes no value, and yes is one"),
        ([*MESH, "--rank", "1"], "--rank: has no effect without --rehearse"),
        ([*MESH, "--rehearse", "--rank", "8"], "--rank: 8 is none of the 8 ranks"),
        ([*MESH, "--rehearse", "--rank", "-1"], "--rank: -1 is none of the 8 ranks"),
        ([*MESH, "--rehearse", "--rank", "x"], "--rank: "),
    ],
)
def test_arguments_that_say_nothing_are_refused(argv: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        run(argv)
    assert message in str(caught.value)


def test_help_names_both_uses(capsys):
    assert run(["--help"]) == 0
    assert "omnilit env --config FILE --world-size N" in capsys.readouterr().out


def test_env_prints_its_report(capsys):
    assert run([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("versions\n")
    assert "\n\nmachine\n" in text
    assert "\n\nkernels\n" in text
