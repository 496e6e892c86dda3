"""Eight architectures of the sweep, each of another kind; `make sweep` judges all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnilit.testing import run_ranks
from tests.sweep.judge import EXPORT, PACKED, SHARDED, YES, judge_alone, judge_split

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
# Which layouts besides FSDP2, and what each is there for
CHOSEN: dict[str, tuple[str, ...]] = {
    "afmoe": ("Ulysses",),  # looks at what attention gave by `view`
    "apertus": ("TP",),  # a number a layer that every rank applies to its part
    "camembert": (),  # a head inside of another module, made before its embedding
    "cohere2_moe": ("EP",),  # logits times a number
    "llama4_text": (),  # chunks of a sequence, and experts
    "glm4": ("PP",),  # rotates every other number of a part of its heads
    "stablelm": (),  # blocks that keep bounds to themselves
    "mamba": (),  # refused
}
TRAINED = [name for name in CHOSEN if name != "mamba"]


def judge_all(folder: Path) -> dict[str, dict[str, str]]:
    return {name: judge_alone(name, folder / name) for name in CHOSEN}


def split_all(folder: Path) -> dict[str, dict[str, str]]:
    return {
        name: judge_split(name, folder / name, layouts=(SHARDED, *CHOSEN[name])) for name in TRAINED
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("sweep")
    (alone,) = run_ranks(judge_all, 1, folder, tmp_path=folder, timeout_s=150)
    split, _ = run_ranks(split_all, 2, folder, tmp_path=folder, timeout_s=150)
    return {name: {**alone[name], **split.get(name, {})} for name in CHOSEN}


@pytest.mark.parametrize("name", TRAINED)
def test_packed_rows_train_like_one_sequence_at_a_time_and_export_exactly(name, found):
    assert found[name] == dict.fromkeys((PACKED, SHARDED, EXPORT, *CHOSEN[name]), YES)


def test_a_state_along_the_sequence_is_refused_with_the_reason(found):
    (why,) = found["mamba"].values()
    state = "it carries a state along the sequence"
    assert why == f"the model cannot be trained on packed sequences: {state}"
