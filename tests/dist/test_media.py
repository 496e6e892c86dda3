"""Models that see and hear, spread over ranks of which some have nothing to look at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnilit.config import GradientCheckpointingConfig
from omnilit.testing import run_ranks
from tests.helpers.media_spread import Case, check, run_cases

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
AGAIN = {"gradient_checkpointing": GradientCheckpointingConfig(enable=True)}
TWO = (
    Case("qwen3_vl", rows="no image"),
    Case("qwen3_vl", rows="one image", is_synced_last=True),
    Case("qwen3_vl", rows="image last", is_synced_last=True, train=AGAIN),
    Case("qwen3_vl", rows="kinds apart"),
    Case("qwen3_vl", rows="kinds apart", is_ddp=True),
    Case("qwen2_5_vl", rows="all"),
    Case("qwen2_vl", rows="one image", train={"freeze_vit": True}),
    Case("qwen3_vl_moe", {"ep_size": 2}, rows="one image"),
    Case("qwen3_vl", {"ulysses_size": 2}, rows="all"),
    Case("qwen3_5", {"ulysses_size": 2}, rows="all"),
    Case("qwen3_vl", {"cp_size": 2}, rows="all"),
    Case("llava", rows="one image"),
    Case("llava", {"ulysses_size": 2}, rows="image last"),
    Case("internvl", rows="image last"),
    Case("smolvlm", rows="one image"),
    Case("qwen2_5_omni_thinker", rows="sound apart"),
    Case("qwen3_omni_moe_thinker", rows="sound apart"),
    Case("qwen3_omni_moe_thinker", {"ulysses_size": 2}, rows="sound apart"),
    Case("qwen2_5_vl", {"tp_size": 2}, rows="all"),
    Case("qwen3_vl", {"tp_size": 2}, rows="all"),
    Case("qwen3_vl_moe", {"tp_size": 2}, rows="all"),
    Case("qwen3_vl", rows="uneven", train=AGAIN, is_balanced=True),
    Case("qwen3_vl_moe", {"ep_size": 2}, rows="uneven", is_balanced=True, is_synced_last=True),
    Case("qwen3_omni_moe_thinker", rows="sound apart", is_ddp=True, is_balanced=True),
    Case("qwen2_5_vl", rows="uneven", train={"freeze_vit": True}, is_balanced=True),
)
FOUR = (
    Case("qwen3_vl", {"dp_replicate_size": 2}, rows="kinds apart"),
    Case("qwen3_vl_moe", {"ep_size": 2, "ulysses_size": 2}, rows="all"),
    Case("qwen3_vl", {"dp_replicate_size": 2}, rows="one image", is_balanced=True),
    Case("qwen3_vl", {"ulysses_size": 2}, rows="uneven", is_balanced=True),
    Case("qwen3_5", {"cp_size": 2}, rows="uneven", is_balanced=True),
    Case("qwen2_vl", {"tp_size": 2}, rows="uneven", is_balanced=True),
)


def alone(case: Case) -> Case:
    """The same step in one process."""
    return replace(
        case,
        sizes={},
        is_ddp=False,
        is_synced_last=False,
        is_balanced=False,
        train={
            name: value for name, value in case.train.items() if name != "gradient_checkpointing"
        },
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    cases = [alone(case) for case in (*TWO, *FOUR)]
    results = run_ranks(run_cases, 1, cases, tmp_path=tmp_path_factory.mktemp("one"))[0]
    return {str(case): result for case, result in zip(cases, results, strict=True)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(run_cases, 2, TWO, tmp_path=tmp_path_factory.mktemp("two"), timeout_s=200)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(run_cases, 4, FOUR, tmp_path=tmp_path_factory.mktemp("four"), timeout_s=200)


@pytest.mark.parametrize("number", range(len(TWO)), ids=list(map(str, TWO)))
def test_two_ranks_train_what_one_process_does(number, one, two):
    for rank in two:
        check(rank[number], one[str(alone(TWO[number]))])


@pytest.mark.parametrize("number", range(len(FOUR)), ids=list(map(str, FOUR)))
def test_four_ranks_train_what_one_process_does(number, one, four):
    for rank in four:
        check(rank[number], one[str(alone(FOUR[number]))])
