"""Ways to spread a run that are the same run: of all of them those that notice most."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.broken import BROKEN, Broken
from tests.helpers.equivalence import (
    STEPS_PER_PASS,
    Job,
    Key,
    Result,
    check_labels,
    check_member,
    run_jobs,
    sizes_of,
    write_inputs,
)
from tests.helpers.members import CLASSES, Equivalence, why_left_out

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
Results = dict[Key, list[Result]]
DENSE = CLASSES[0]


def jobs_of(one: Equivalence) -> list[Job]:
    first, *others = one.members
    chosen = [first, *(m for m in others if m.name in one.quick and why_left_out(m) is None)]
    return [Job((one.name, m.name), m, STEPS_PER_PASS, is_seeing=one.is_seeing) for m in chosen]


def broken_job(one: Broken) -> Job:
    return Job((one.of, one.name), one.layout, STEPS_PER_PASS, broken=one.broken)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("classes")
    write_inputs(folder, CLASSES)
    jobs = [job for one in CLASSES for job in jobs_of(one)]
    jobs += map(broken_job, BROKEN)
    return run_jobs(folder, jobs, tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("one", CLASSES, ids=[one.name for one in CLASSES])
def test_members_train_the_steps_of_the_first(one: Equivalence, trained: Results):
    first, *others = jobs_of(one)
    expected = trained[first.key][0]
    assert len(expected["numbers"]) == STEPS_PER_PASS
    for job in others:
        check_member(trained[job.key], expected)
        if sizes_of(job.layout).data_size > 1:
            check_labels(trained[job.key])


@pytest.mark.parametrize("one", BROKEN, ids=[one.name for one in BROKEN])
def test_a_broken_mechanism_is_noticed(one: Broken, trained: Results):
    (first,) = (known.members[0] for known in CLASSES if known.name == one.of)
    expected = trained[one.of, first.name][0]
    with pytest.raises(AssertionError, match=one.noticed):
        check_member(trained[broken_job(one).key], expected)


def test_every_quick_member_is_one_of_its_class():
    for one in CLASSES:
        names = [member.name for member in one.members]
        assert len(set(names)) == len(names)
        assert one.quick < set(names)


def test_a_member_that_the_release_cannot_run_is_left_out_with_the_reason():
    layout = DENSE.members[0]
    assert why_left_out(layout) is None
    unknown = replace(layout, over={"accelerator": {"warp_size": 2}})
    assert why_left_out(unknown) == "train.accelerator.warp_size does not exist"


def test_no_member_is_left_out():
    reasons = {m.name: why_left_out(m) for one in CLASSES for m in one.members}
    assert not {name: why for name, why in reasons.items() if why is not None}
