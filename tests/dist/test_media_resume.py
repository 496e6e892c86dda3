"""Runs on images that are saved amid an epoch and go on at another layout."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from omnilit.config import DataloaderConfig
from omnilit.data.streams import stream
from omnilit.modules import VLMModule
from omnilit.testing import run_ranks
from tests.helpers import media_runs, training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
NUMBER, STEPS = 36, 6


class Run(NamedTuple):
    """A run of the chain.

    Args:
        out: Its folder.
        workers: Processes that load.
        start: Folder and step that it goes on from; None for the beginning.
        whole: The uninterrupted run.
    """

    out: str
    workers: int
    start: tuple[str, int] | None = None
    whole: str = "one"

    @property
    def data(self) -> dict[str, Any]:
        """How it reads: prepared, or streamed in shards."""
        data: dict[str, Any] = {"dataloader": DataloaderConfig(num_workers=self.workers)}
        if self.whole == STREAM:
            data |= {"datasets_type": "iterable", "dyn_bsz_buffer_size": 7}
        return data


STREAM = "stream"
CHAIN = (
    (1, [Run("one", 0), Run("one, 2 workers", 2, ("one", 2)), Run(STREAM, 0, whole=STREAM)]),
    (
        2,
        [
            Run("two, 2 workers", 2, ("one", 2)),
            Run("two", 0, ("two, 2 workers", 4)),
            Run("stream, two, 2 workers", 2, (STREAM, 2), STREAM),
        ],
    ),
    (
        1,
        [
            Run("one again", 2, ("two, 2 workers", 3)),
            Run("stream again", 0, ("stream, two, 2 workers", 4), STREAM),
        ],
    ),
)
RESUMED = [run for _, runs in CHAIN for run in runs if run.start is not None]


def go(folder: Path, runs: list[Run]) -> dict[str, Any]:
    multiprocessing.set_start_method("fork", force=True)  # a fork server imports torch anew
    stream.SHARD_BYTES = 1024  # a rank is a process of its own
    found = {}
    for run in runs:
        load = None
        if run.start is not None:
            load = folder / run.start[0] / f"checkpoints/global_step_{run.start[1]}"
        seen = media_runs.SeenSteps()
        settings = {"global_batch_size": 2, "max_steps": STEPS, "checkpoint": {"save_steps": 1}}
        log, _ = training.train(
            folder,
            training.arguments(folder / run.out, **settings),
            module_class=VLMModule,
            data={"train_size": None, **run.data},
            load_path=load,
            callbacks=(seen,),
        )
        found[run.out] = {"seen": seen.by_step, "numbers": training.numbers(log)}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    media_runs.write_seeing_model(folder / "model")
    media_runs.write_questions(folder / "train.jsonl", NUMBER)
    return folder


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    found: dict[str, Any] = {}
    for size, runs in CHAIN:
        place = tmp_path_factory.mktemp("ranks")
        ranks = run_ranks(go, size, folder, runs, tmp_path=place, timeout_s=150)
        for name, first in ranks[0].items():
            steps = zip(*(rank[name]["seen"] for rank in ranks), strict=True)
            found[name] = {**first, "seen": [sum(step, Counter()) for step in steps]}
    return found


@pytest.mark.parametrize("name", ["one", STREAM])
def test_an_uninterrupted_run_sees_each_record_and_image_at_most_once(name, results):
    seen = results[name]["seen"]
    assert len(seen) == STEPS
    total = sum(seen, Counter())
    assert set(total.values()) == {1}
    kinds = Counter(kind for kind, _ in total)
    assert min(kinds["image"], kinds["row"]) > STEPS  # more than one a step


@pytest.mark.parametrize("run", RESUMED, ids=[run.out for run in RESUMED])
def test_a_run_on_images_goes_on_where_it_was_saved_at_any_layout(results, run):
    assert run.start is not None
    after, whole = run.start[1], results[run.whole]
    assert results[run.out]["seen"] == whole["seen"][after:]
    pairs = zip(results[run.out]["numbers"], whole["numbers"][after:], strict=True)
    for (step, loss, norm, tokens), (at, *expected, count) in pairs:
        assert (step, tokens) == (at, count)
        assert [loss, norm] == pytest.approx(expected, rel=1e-5)
