"""Judge every causal language model of transformers and write docs/models.md.

With names of architectures as arguments only those are judged, and only their rows change.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omnilit.testing import PRELOAD, run_ranks
from tests.sweep.judge import DIFFERS, PACKED, YES, judge_alone, judge_split
from tests.sweep.page import SPLIT, Verdict, update_page
from tests.sweep.tiny import architectures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
JOBS = 2
TIMEOUT_S = 120.0


def judge(model_type: str) -> Verdict:
    """All columns of one architecture."""
    began = time.monotonic()
    columns: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        for function, num_ranks in ((judge_alone, 1), (judge_split, 2)):
            folder = Path(name)
            try:
                (found, *_) = run_ranks(
                    function, num_ranks, model_type, folder, tmp_path=folder, timeout_s=TIMEOUT_S
                )
            except AssertionError as error:  # what run_ranks raises of its ranks
                column = PACKED if num_ranks == 1 else SPLIT
                found = {column: f"{DIFFERS}{_first_of(str(error))}"}
            columns |= found
            if columns.get(PACKED) != YES:
                break
    verdict = Verdict(model_type, columns)
    sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {verdict.in_a_line()}\n")
    sys.stdout.flush()
    return verdict


def _first_of(failures: str) -> str:
    """What the rank said that failed first: the others lose their connection to it."""
    said = [
        part.strip().splitlines() for part in re.split(r"^rank \d+: ", failures, flags=re.MULTILINE)
    ]
    lines = [lines[-1] for lines in said if lines]
    first = [line for line in lines if "closed by peer" not in line and "ranks [" not in line]
    return (first or lines)[0]


def main(names: Sequence[str]) -> int:
    """Judge, and count what is a mistake of ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    multiprocessing.set_forkserver_preload([*PRELOAD, "tests.sweep.judge"])
    with ThreadPoolExecutor(JOBS) as pool:
        verdicts = list(pool.map(judge, names or architectures()))
    wrong = [verdict.model_type for verdict in verdicts if verdict.is_wrong]
    update_page(PAGE, verdicts)
    if wrong:
        sys.stdout.write(f"{len(wrong)} differ: {', '.join(wrong)}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
