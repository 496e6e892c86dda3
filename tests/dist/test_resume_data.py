"""The short form of `make invariant`'s matrix: two pairs of layouts for every kind of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.resume import KINDS, Layout, count_differences, run, write_data

pytestmark = [pytest.mark.dist, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resume")
    write_data(place)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_and_workers_loses_and_repeats_nothing(folder: Path, kind: str):
    out = kind.replace(" ", "_")
    over = {"max_steps": 9, "checkpoint": {"save_steps": 3}}
    undisturbed = run(folder, kind, Layout(1, 0), out, over=over)
    assert sum(map(len, undisturbed)) > 30
    load = f"{out}/checkpoints/global_step_3"
    again = run(folder, kind, Layout(2, 2), f"{out}_two", over=over, load=load)
    assert count_differences(undisturbed[3:], again) == (0, 0)
    load = f"{out}_two/checkpoints/global_step_6"
    again = run(folder, kind, Layout(1, 0), f"{out}_one", over=over, load=load)
    assert count_differences(undisturbed[6:], again) == (0, 0)
