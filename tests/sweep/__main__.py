"""Judge the causal language models of transformers, and those with towers, and write their pages.

The pages are docs/models.md and docs/vision-language-models.md; with the name of one as the first
argument only its models are judged. With names of architectures behind it only those are judged,
and only their rows change.
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
from functools import partial
from pathlib import Path

from omnilit.testing import PRELOAD, run_ranks
from tests.sweep.judge import DIFFERS, YES, judge_alone, judge_split
from tests.sweep.page import SPLIT, Verdict, update_page
from tests.sweep.subject import PACKED, SUBJECTS, Subject

DOCS = Path(__file__).resolve().parents[2] / "docs"
JOBS = 2
TIMEOUT_S = 120.0


def judge(model_type: str, subject: Subject) -> Verdict:
    """All columns of one architecture."""
    began = time.monotonic()
    columns: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        for function, num_ranks in ((judge_alone, 1), (judge_split, 2)):
            folder = Path(name)
            try:
                (found, *_) = run_ranks(
                    partial(function, model_type, folder, subject=subject),
                    num_ranks,
                    tmp_path=folder,
                    timeout_s=TIMEOUT_S,
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


def main(arguments: Sequence[str]) -> int:
    """Judge, and count what is a mistake of ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    multiprocessing.set_forkserver_preload([*PRELOAD, "tests.sweep.judge"])
    page, *names = arguments or [""]
    wrong: list[str] = []
    for subject in SUBJECTS:
        if page in ("", subject.page):
            wrong += sweep(subject, names)
    if wrong:
        sys.stdout.write(f"{len(wrong)} differ: {', '.join(wrong)}\n")
    return 1 if wrong else 0


def sweep(subject: Subject, names: Sequence[str]) -> list[str]:
    """Judge architectures, all by default, and write their page; returns those that differ."""
    with ThreadPoolExecutor(JOBS) as pool:
        chosen = names or subject.architectures()
        verdicts = list(pool.map(partial(judge, subject=subject), chosen))
    update_page(DOCS / subject.page, verdicts, subject=subject)
    return [verdict.model_type for verdict in verdicts if verdict.is_wrong]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
