"""Ranks that look at each other's images: whole runs on files, and what a mistake would do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from omnilit.models.media import feed
from omnilit.modules import VLMModule
from omnilit.parallel import rows
from omnilit.testing import run_ranks
from omnilit.types import RowCounts
from tests.helpers import training
from tests.helpers.media_runs import ask, write_seeing_model
from tests.helpers.media_spread import Case, check, run_case
from tests.helpers.processors import write_image

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
# Height and width of the images of each record; patches are of 16 pixels
RECORDS = (
    [(192, 192), (64, 64), (96, 64)],
    [],
    [(64, 96)],
    [],
    [],
    [(256, 128), (128, 128)],
    [(64, 64), (64, 64)],
    [],
)
STEPS = 2
NAME = "encoder_load/max_over_mean"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its processor, and records of which half have images."""
    folder = tmp_path_factory.mktemp("balance")
    write_seeing_model(folder / "model")
    lines = []
    for number, sizes in enumerate(RECORDS):
        names = [
            write_image(folder / f"{number}_{at}.png", *size, seed=10 * number + at)
            for at, size in enumerate(sizes)
        ]
        images = [{"type": "image", "image": name} for name in names]
        text = {"type": "text", "text": "What is it?"}
        lines.append(json.dumps(ask(*images, text, answer=f"Number {number}.")) + "\n")
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def run(folder: Path, out: str, sizes: dict[str, Any], *, is_balanced: bool) -> dict[str, Any]:
    """Two steps and an evaluation."""
    arguments = training.arguments(
        folder / out,
        accelerator=sizes,
        micro_batch_size=1,
        global_batch_size=4,
        eval_epochs=1,
    )
    log, module = training.train(
        folder,
        arguments,
        module_class=VLMModule,
        model={"encoder_data_balance": is_balanced},
        data={"max_seq_len": 128, "train_size": None, "eval_path": str(folder / "eval.jsonl")},
    )
    return {
        "numbers": training.numbers(log),
        "flops": [result.flops for result in log.results],
        "eval": module.eval_result,
        "lines": training_lines(folder / out) if dist.get_rank() == 0 else [],
    }


def training_lines(out: Path) -> list[dict[str, float]]:
    """What `metrics.jsonl` says of each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run_two(folder: Path) -> list[dict[str, Any]]:
    """Two data ranks with and without balance, and two that share each row."""
    return [
        run(folder, "apart", {}, is_balanced=False),
        run(folder, "balanced", {}, is_balanced=True),
        run(folder, "row", {"ulysses_size": 2}, is_balanced=True),
    ]


def test_whole_runs_are_those_of_one_process_and_say_how_even_the_work_was(folder, tmp_path):
    one = run_ranks(run_alone, 1, folder, tmp_path=tmp_path / "one")[0]
    ranks = run_ranks(run_two, 2, folder, tmp_path=tmp_path / "two", timeout_s=100)
    assert len(one["numbers"]) == STEPS
    for rank in ranks:
        for found in rank:
            for mine, theirs in zip(found["numbers"], one["numbers"], strict=True):
                assert (mine[0], mine[3]) == (theirs[0], theirs[3])
                assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
            assert found["eval"] == pytest.approx(one["eval"], rel=1e-5)
            assert found["flops"] == pytest.approx(one["flops"])
    apart, balanced, row = (found["lines"] for found in ranks[0])
    assert not any(NAME in line for line in (*apart, *one["lines"]))
    assert [NAME in line for line in balanced] == [True, False]  # the last step has no image
    assert 1 <= balanced[0][NAME] < balanced[0][f"{NAME}_before"] <= 2
    # where each of two would look at everything
    assert 1 <= row[0][NAME] < row[0][f"{NAME}_before"] == pytest.approx(2)


def run_alone(folder: Path) -> dict[str, Any]:
    """One process, which has nobody to share with."""
    return run(folder, "one", {}, is_balanced=True)


BALANCED = Case("qwen3_vl", rows="uneven", is_balanced=True)
SHARED = Case("qwen3_vl", {"ulysses_size": 2}, rows="uneven")


@contextmanager
def unordered(field: str) -> Iterator[None]:
    """Features are taken for those of other places, the last for the first."""
    build = feed.build_route

    def broken(*args: Any, **kwargs: Any) -> Any:
        route, kept = build(*args, **kwargs)
        return replace(route, **{field: getattr(route, field).flip(0)}), kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "build_route", broken)
        yield


@contextmanager
def unreturned() -> Iterator[None]:
    """Gradients do not go back to the rank whose tower gave the features."""

    def stay(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        counts, group = ctx.trade
        came = rows._trade(gradients[0], RowCounts(counts.received, counts.sent), group)
        return came.flip(0), None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows._Trade, "backward", staticmethod(stay))
        yield


def run_broken() -> Sequence[Any]:
    """The step as it should be, and with one thing wrong at a time."""
    found = [run_case(BALANCED)]
    for case, broken in (
        (BALANCED, unordered("order")),
        (SHARED, unordered("order")),
        (SHARED, unordered("own")),
        (BALANCED, unreturned()),
    ):
        with broken:
            found.append(run_case(case))
    return found


def run_whole() -> Any:
    """The step in one process."""
    return run_case(replace(BALANCED, is_balanced=False))


def test_features_out_of_order_and_gradients_astray_would_be_noticed(tmp_path):
    whole = run_ranks(run_whole, 1, tmp_path=tmp_path)[0]
    for rank in run_ranks(run_broken, 2, tmp_path=tmp_path):
        check(rank[0], whole)
        for broken in rank[1:]:
            with pytest.raises(AssertionError):
                check(broken, whole)
