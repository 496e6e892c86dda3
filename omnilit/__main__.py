"""The entry point: a static help page, then the one module that the verb needs.

Nothing here imports torch, transformers or lightning, so `omnilit --help` answers at once.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Final, NoReturn

from omnilit import __version__
from omnilit.errors import ConfigError, OmniError, RestartError, suggest
from omnilit.logging import format_table, process_rank
from omnilit.plugins import load_plugins

TRAINING: Final = "omnilit.cli.main"
TARGETS: Final = {
    "fit": TRAINING,
    "validate": TRAINING,
    "infer": "omnilit.tools.infer",
    "env": "omnilit.tools.env",
    "schema": "omnilit.tools.schema",
    "data": "omnilit.tools.data",
    "report": "omnilit.tools.report.command",
    "export": "omnilit.tools.export",
}
VERBS: Final = (
    ("fit", "train a model: omnilit fit FILE.yaml [--train.max_steps 10 ...]"),
    ("validate", "evaluate a model on data.eval_path"),
    ("infer", "chat with a model, or answer one --prompt"),
    ("env", "versions, devices, kernels; the mesh: omnilit env FILE.yaml --world-size N"),
    ("schema", "print a JSON Schema of the YAML, for editors"),
    ("data", "look into a data set: numbers, bad records, samples with --show N"),
    ("report", "write curves, settings and samples of runs as one page: omnilit report RUN_DIR..."),
    ("export", "make a Hugging Face folder of a checkpoint: omnilit export CHECKPOINT OUT"),
)
PARENT_TIMEOUT_S: Final = 30.0
# Lightning's names, which its users will try
RENAMED: Final = {"test": "evaluation is 'validate'", "predict": "generation is 'infer'"}


class ProcessEnd:
    """Ends the process behind all other exit handlers, without tearing the interpreter down.

    A thread of gloo, Arrow or another library below may still be giving a tensor back. The
    interpreter ends such a thread when it asks for the lock, from within code that C++ does not
    let it leave: `terminate called without an active exception`, exit code -6, now and then.
    """

    def __init__(self) -> None:
        self.code = 1  # what an error that nobody caught leaves behind

    def leave(self) -> None:
        """Hand over what was printed, and go."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        os._exit(self.code)


def run_process() -> None:
    """The command `omnilit`: `main` on this process's arguments, and the process's end."""
    end = ProcessEnd()
    atexit.register(end.leave)  # the first to be registered is the last to run
    try:
        end.code = main()
    except SystemExit as error:
        end.code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    raise SystemExit(end.code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: The arguments after the program's name; those of this process by default.

    Returns:
        The exit code: 0, 2 for what the user can mend, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        sys.stdout.write(help_text())
        return 0
    if words[0] in {"-V", "--version"}:
        sys.stdout.write(f"omnilit {__version__}\n")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in TARGETS:
        return _refuse(verb)
    try:
        load_plugins()
        return _load(verb)(_name_config(rest))
    except OmniError as error:
        if isinstance(error, RestartError) and argv is None:
            _restart(error.environment)
        rank = process_rank()
        sys.stderr.write(f"rank {rank} ends: {error}\n" if rank else error_text(error))
        if rank and "LOCAL_RANK" in os.environ and "RANK" not in os.environ:
            _outlive_parent()
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _restart(environment: Mapping[str, str]) -> NoReturn:
    """Begin again in this very process, with what only a start reads."""
    sys.stderr.flush()
    words = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, words, {**os.environ, **environment})  # noqa: S606 - our own words


def help_text() -> str:
    """The page that `omnilit --help` shows."""
    table = format_table("verbs:", ("verb", "what it does"), VERBS)
    return (
        "usage: omnilit VERB [FILE.yaml] [--key.sub_key VALUE ...]\n\n"
        f"{table}\n\n"
        "omnilit VERB --help lists the settings of a verb. omnilit --version prints the version.\n"
    )


def error_text(error: OmniError) -> str:
    """What is wrong, as a list; one point a problem."""
    lines = [str(p) for p in error.problems] if isinstance(error, ConfigError) else [str(error)]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "".join([f"error: {count}\n", *(f"  - {line}\n" for line in lines)])


def _outlive_parent() -> None:
    """Let rank 0 end first: Lightning kills it, unheard, once a process it started has failed."""
    parent, end = os.getppid(), time.monotonic() + PARENT_TIMEOUT_S
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.1)


def _refuse(verb: str) -> int:
    known = list(TARGETS)
    if verb in RENAMED:
        message = f"there is no '{verb}': {RENAMED[verb]}."
    else:
        message = f"there is no '{verb}'.{suggest(verb, known)}"
    sys.stderr.write(f"error: {message} The verbs are {', '.join(known)}.\n")
    return 2


def _load(verb: str) -> Callable[[list[str]], int]:
    """The verb's function of its own arguments; only its module is imported."""
    run: Callable[..., int] = import_module(TARGETS[verb]).run
    if TARGETS[verb] == TRAINING:
        return lambda argv: run(verb, argv)
    return run


def _name_config(argv: list[str]) -> list[str]:
    """Let `VERB FILE.yaml` stand for `VERB --config FILE.yaml`, which the parser insists on."""
    if argv and argv[0].endswith((".yaml", ".yml")):
        return ["--config", *argv]
    return argv


if __name__ == "__main__":
    run_process()
