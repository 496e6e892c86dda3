"""Some architectures of the sweep, each of another kind; `make sweep` judges all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnilit.testing import run_ranks
from tests.sweep.judge import YES, judge_alone, judge_split
from tests.sweep.subject import EXPORT, PACKED, SHARDED, TOWERS

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
SEEING: dict[str, tuple[str, ...]] = {
    "glm4v": ("Ulysses",),  # videos take the places of images
    "hunyuan_vl": (),  # ends of lines among the places of an image
    "idefics2": ("Ulysses",),  # features of another number than the tower's
    "llava_next_video": (),  # tiles and sizes of images, whole pictures of videos
    "minicpmv4_7": (),  # all images in one strip, positions counted from their sides
    "qwen3_omni_moe_thinker": ("TP",),  # sounds; norms of heads, which are split
}


def judge_all(folder: Path) -> dict[str, dict[str, str]]:
    return {name: judge_alone(name, folder / name) for name in CHOSEN}


def split_all(folder: Path) -> dict[str, dict[str, str]]:
    return {
        name: judge_split(name, folder / name, layouts=(SHARDED, *CHOSEN[name])) for name in TRAINED
    }


def judge_seeing(folder: Path) -> dict[str, dict[str, str]]:
    return {name: judge_alone(name, folder / name, subject=TOWERS) for name in (*SEEING, "step3p7")}


def split_seeing(folder: Path) -> dict[str, dict[str, str]]:
    chosen = {**SEEING, "step3p7": ()}
    return {
        name: judge_split(name, folder / name, (SHARDED, *more), subject=TOWERS)
        for name, more in chosen.items()
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("towers")
    (alone,) = run_ranks(judge_seeing, 1, folder, tmp_path=folder, timeout_s=150)
    split, _ = run_ranks(split_seeing, 2, folder, tmp_path=folder, timeout_s=150)
    return {name: {**alone[name], **split[name]} for name in alone}


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


@pytest.mark.parametrize("name", SEEING)
def test_packed_rows_with_media_train_like_one_sample_at_a_time(name, seen):
    assert seen[name] == dict.fromkeys((PACKED, SHARDED, EXPORT, *SEEING[name]), YES)


def test_a_tower_that_runs_again_for_local_views_is_refused_on_several_ranks(seen):
    assert seen["step3p7"][PACKED] == YES
    assert "its tower runs once more where images have local views" in seen["step3p7"][SHARDED]
