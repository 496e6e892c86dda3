"""A run saved at any layout goes on at any other: every pair, whole trainers, real checkpoints."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.resume import (
    KINDS,
    Layout,
    all_records,
    count_differences,
    run,
    shuffled_layouts,
    write_data,
)

SAVED_AT, LAST = 3, 40
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("matrix")
    write_data(place)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_no_record_is_lost_or_repeated_between_any_two_layouts(folder: Path, kind: str):
    over = {"max_steps": LAST}
    undisturbed = run(folder, kind, Layout(1, 0), "undisturbed", over=over)
    read = set().union(*undisturbed)
    assert read == all_records(folder, kind)  # the steps hold a whole pass
    totals, lines = [0, 0], []
    layouts = shuffled_layouts()
    for saved in layouts:
        out = f"saved_{saved}"
        first = {"max_steps": SAVED_AT}
        before = run(folder, kind, saved, out, over=first | {"checkpoint": {"save_steps": 3}})
        load = f"{out}/checkpoints/global_step_{SAVED_AT}"
        row = []
        for resumed in layouts:
            after = run(folder, kind, resumed, "resumed", over=over, load=load)
            lost, repeated = count_differences(undisturbed, before + after)
            row.append(f"{lost}/{repeated}")
            totals = [totals[0] + lost, totals[1] + repeated]
            shutil.rmtree(folder / "resumed")
        lines.append(f"{saved} | " + "  ".join(row))
        shutil.rmtree(folder / out)
    shutil.rmtree(folder / "undisturbed")
    title = f"{kind}: records lost/repeated, layouts are processes x workers"
    header = "saved | resumed at " + "  ".join(map(str, layouts))
    last = f"{len(layouts) ** 2} resumes, lost {totals[0]}, repeated {totals[1]}"
    sys.stdout.write("\n".join(["", title, header, *lines, last, ""]))
    assert totals == [0, 0]
