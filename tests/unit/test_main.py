import subprocess
import sys

import pytest

import omnilit
from omnilit.__main__ import TARGETS, VERBS, error_text, main
from omnilit.errors import CheckpointError, ConfigError, DataError, Problem


def _stub_verb(monkeypatch, verb, run):
    module = type(sys)("stub_of_a_verb")
    module.run = run
    monkeypatch.setitem(sys.modules, TARGETS[verb], module)


def test_help_and_no_arguments_list_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == text
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")][1:]
    assert listed == [*TARGETS] == [name for name, _ in VERBS]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from omnilit.__main__ import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'lightning', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_omnilit_prints_the_version():
    command = [sys.executable, "-m", "omnilit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"omnilit {omnilit.__version__}\n")


@pytest.mark.parametrize(
    ("end", "code"),
    [("return 3", 3), ("sys.exit(4)", 4), ("sys.exit('no')", 1), ("raise ValueError", 1)],
)
def test_the_process_ends_with_its_code_and_never_tears_the_interpreter_down(end, code):
    program = f"""
import atexit, sys
from omnilit.__main__ import TARGETS, run_process

class Late:
    def __del__(self):
        print("torn down")

def run(argv):
    atexit.register(print, "exit handlers run")
    print("said")
    {end}

module = type(sys)("stub")
module.run, module.late = run, Late()
sys.modules[TARGETS["env"]] = module
sys.argv = ["omnilit", "env"]
run_process()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stdout == "said\nexit handlers run\n"


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("fti", "there is no 'fti'. Did you mean 'fit'?"),
        ("test", "there is no 'test': evaluation is 'validate'."),
        ("predict", "there is no 'predict': generation is 'infer'."),
    ],
)
def test_unknown_verb_names_what_to_use(capsys, verb, message):
    assert main([verb]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.yaml", "run.yml"])
def test_yaml_after_the_verb_becomes_config_flag(monkeypatch, name):
    seen = []
    _stub_verb(monkeypatch, "fit", lambda verb, argv: seen.append((verb, argv)) or 0)
    assert main(["fit", name, "--train.seed", "1"]) == 0
    assert seen == [("fit", ["--config", name, "--train.seed", "1"])]


def test_other_words_after_the_verb_stay(monkeypatch):
    seen = []
    _stub_verb(monkeypatch, "infer", lambda argv: seen.append(argv) or 0)
    main(["infer", "--config", "a.yaml"])
    assert seen == [["--config", "a.yaml"]]


def test_exit_code_is_the_verbs(monkeypatch):
    _stub_verb(monkeypatch, "validate", lambda verb, argv: 7)
    assert main(["validate"]) == 7


def test_problems_are_listed_without_traceback(monkeypatch, capsys):
    problems = [Problem("a.b", "is wrong", "mend it"), Problem("c", "is worse", "drop it")]

    def run(argv):
        raise ConfigError.of(problems)

    _stub_verb(monkeypatch, "infer", run)
    assert main(["infer"]) == 2
    assert capsys.readouterr().err == (
        "error: 2 problems\n"
        "  - a.b: is wrong. To fix: mend it.\n"
        "  - c: is worse. To fix: drop it.\n"
    )


@pytest.mark.parametrize(
    "error", [CheckpointError("gone"), DataError(problem="bad", fix="mend", file="f", row=3)]
)
def test_other_errors_of_a_user_are_one_problem(error):
    assert error_text(error) == f"error: 1 problem\n  - {error}\n"


def test_interrupt_exits_with_130(monkeypatch):
    def run(argv):
        raise KeyboardInterrupt

    _stub_verb(monkeypatch, "env", run)
    assert main(["env"]) == 130


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(argv):
        raise ZeroDivisionError

    _stub_verb(monkeypatch, "env", run)
    with pytest.raises(ZeroDivisionError):
        main(["env"])
