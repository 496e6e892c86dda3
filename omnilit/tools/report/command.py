"""The verb: which runs to read, and where the page goes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from omnilit.cli.raw import read_command
from omnilit.errors import ConfigError, Problem, suggest
from omnilit.logging import format_table
from omnilit.tools.flags import take_count, take_value

if TYPE_CHECKING:
    from omnilit.tools.report.samples import SharedSamples

OUT: Final = "report.html"
NUM_SAMPLES: Final = 3
FLAGS: Final = ("out", "samples")
USAGE: Final = f"""\
usage: omnilit report RUN_DIR... [--out FILE] [--samples N]

Writes what runs left in their folders as one page that needs nothing beside itself: curves laid
over each other, a summary, the configurations and their differences, samples of the data, what was
saved. RUN_DIR is the folder that train.checkpoint.output_dir names. A run may still be going on.

  --out FILE   where to write the page; {OUT} here without it
  --samples N  samples of the data to show, {NUM_SAMPLES} without it; 0 does not read the data
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    Args:
        folders: Of the runs.
        out: Where to write the page.
        num_samples: Samples of each run's data.
    """

    folders: tuple[Path, ...]
    out: Path = Path(OUT)
    num_samples: int = NUM_SAMPLES


def run(argv: Sequence[str]) -> int:
    """Write the report of some runs, and print its summary; returns the exit code.

    Raises:
        ConfigError: A folder holds no run, a flag is wrong, or the page cannot be written.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return 0
    request = parse_request(argv)
    # imported only now: a wrong argument is told at once
    from omnilit.tools.page import save_page
    from omnilit.tools.report.page import build_page
    from omnilit.tools.report.runs import read_runs
    from omnilit.tools.report.summary import summarize

    runs = read_runs(request.folders)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    samples: list[SharedSamples] = []
    if request.num_samples:
        from omnilit.tools.report.samples import show_samples

        samples = show_samples(runs, request.num_samples)
    save_page(build_page(runs, samples), request.out, key="--out")
    table = summarize(runs)
    sys.stdout.write(f"{format_table(table.title, table.header, table.rows)}\n")
    sys.stderr.write(f"page: {request.out}\n")
    return 0


def parse_request(argv: Sequence[str]) -> Request:
    """Read the words after the verb: folders first, then flags.

    Raises:
        ConfigError: All that is wrong with them.
    """
    folders = tuple(Path(word) for word in takewhile(lambda w: not w.startswith("-"), argv))
    command = read_command(argv[len(folders) :])
    own = {name: words for name, words in command.flags if name in FLAGS}
    unknown = [name for name, _ in command.flags if name not in FLAGS]
    unknown += ["config"] if command.files else []
    unknown += ["print_config"] if command.is_print_config else []
    problems = [
        Problem(f"--{name}", f"report has no such flag.{suggest(name, FLAGS)}", "leave it out")
        for name in unknown
    ]
    if not folders:
        problem = "no run is given"
        problems.append(Problem("RUN_DIR", problem, "write omnilit report RUN_DIR... [--out FILE]"))
    out = take_value(own, "out", str, problems) if "out" in own else OUT
    shown = take_count(own, "samples", problems) if "samples" in own else NUM_SAMPLES
    if problems:
        raise ConfigError.of(problems)
    return Request(folders, Path(out), shown)
