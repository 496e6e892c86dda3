"""Every way to spread a training run is the same run; prints how far each lies from one process."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.equivalence import (
    LOSS,
    SAVED_AT,
    Cuts,
    Job,
    Key,
    Result,
    check_labels,
    check_member,
    read_cuts,
    run_jobs,
    saved,
    splits_tokens,
    table,
    work_lines,
    write_inputs,
)
from tests.helpers.layouts import Deviation
from tests.helpers.members import CLASSES, Equivalence, why_left_out

STEPS = 10
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Results = dict[Key, list[Result]]


@pytest.fixture(scope="module", params=CLASSES, ids=[one.name for one in CLASSES])
def one(request: pytest.FixtureRequest) -> Equivalence:
    return request.param


@pytest.fixture(scope="module")
def folder(one: Equivalence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class")
    write_inputs(folder, [one])
    return folder


def jobs_of(one: Equivalence) -> list[Job]:
    members = [member for member in one.members if why_left_out(member) is None]
    return [
        Job((one.name, m.name), m, STEPS, is_saving=True, is_seeing=one.is_seeing) for m in members
    ]


@pytest.fixture(scope="module")
def trained(one: Equivalence, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_jobs(folder, jobs_of(one), tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def loads(one: Equivalence, folder: Path, trained: Results) -> dict[Key, list[Key]]:
    """Which checkpoints each member loads: one of each way to lie on disk, its own way too.

    What a load does depends on where the parts of the tensors are, so members whose checkpoints are
    cut alike stand for each other; each takes its turn.
    """
    chosen: dict[Key, list[Key]] = {}
    alike: defaultdict[Cuts, list[Key]] = defaultdict(list)
    for job in jobs_of(one):
        alike[read_cuts(saved(folder, job.key))].append(job.key)
    for turn, job in enumerate(jobs_of(one)):
        keys = [members[turn % len(members)] for members in alike.values()]
        # a run goes on from another member, or unpacked from itself: its batches are its own
        last = next(key for key in keys if key != job.key) if one.is_packed else job.key
        chosen[job.key] = [*(key for key in keys if key != last), last]
    loaded = {key for keys in chosen.values() for key in keys}
    assert loaded == chosen.keys(), "a checkpoint is loaded by no member"
    return chosen


@pytest.fixture(scope="module")
def resumed(
    one: Equivalence,
    folder: Path,
    loads: dict[Key, list[Key]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """Each member with checkpoints of the others loaded, and a step from the last of them."""
    jobs = [
        replace(job, is_saving=False, loads=tuple(saved(folder, key) for key in loads[job.key]))
        for job in jobs_of(one)
    ]
    return run_jobs(folder, jobs, tmp_path=tmp_path_factory.mktemp("ranks"))


def test_every_member_trains_the_steps_of_the_first(one, trained, loads, resumed, capsys):
    jobs = jobs_of(one)
    expected = trained[jobs[0].key][0]
    assert len(expected["numbers"]) == STEPS
    far: dict[str, Deviation] = {}
    resume: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for job in jobs:
        name = job.key[1]
        try:
            far[name] = check_member(trained[job.key], expected)
            resume[name] = check_resumed(resumed[job.key], expected)
            if one.is_packed and splits_tokens(job.layout):
                check_labels(trained[job.key])
        except AssertionError as error:  # the others are of interest too
            wrong[name] = str(error)
    ranks = [rank for results in (trained, resumed) for job in jobs for rank in results[job.key]]
    cpu_s = sum(rank["cpu_s"] for rank in ranks)
    with capsys.disabled():
        num_loads = len(loads[jobs[0].key])
        title = f"{STEPS} steps and {num_loads} checkpoints loaded by each, {cpu_s:.0f} s of CPU"
        lines = [table(one, far, resume, wrong), *work_lines(trained)]
        text = "\n".join(lines)
        sys.stdout.write(f"\n{title}; {text}\n")
    assert not wrong


def check_resumed(ranks: list[Result], expected: Result) -> float:
    """How far the step after a resume lies from the one that the class took."""
    (step, loss, norm, tokens), *more = ranks[0]["numbers"]
    wanted = expected["numbers"][SAVED_AT]
    assert not more
    assert (step, tokens) == (wanted[0], wanted[3])
    assert abs(norm / wanted[2] - 1) <= LOSS
    assert abs(loss / wanted[1] - 1) <= LOSS
    return abs(loss / wanted[1] - 1)


def test_every_checkpoint_loads_to_the_bit_in_every_member(one, trained, loads, resumed):
    for job in jobs_of(one):
        for rank in resumed[job.key]:
            for key, found in zip(loads[job.key], rank["states"], strict=True):
                state = trained[key][0]["state"]
                assert state
                wrong = [n for n in state.keys() | found.keys() if state.get(n) != found.get(n)]
                assert not wrong, f"{key[1]} loaded as {job.key[1]}: {wrong[:5]}"
