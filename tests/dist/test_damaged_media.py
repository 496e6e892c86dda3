"""One rank comes to an image that cannot be used: no other rank hangs, and all are told which."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilit.config import DataloaderConfig, TrainingArguments
from omnilit.data.media.processor import MediaProcessor, load_processor
from omnilit.data.quarantine import BadRecord, read_quarantine
from omnilit.data.streams import stream
from omnilit.data.transforms import TransformSettings
from omnilit.errors import DataError
from omnilit.modules import VLMModule
from omnilit.modules.loaders import LoaderFactory, LoaderSettings
from omnilit.modules.preparation import Preparation
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.testing import run_ranks
from tests.helpers import media_runs, training
from tests.helpers.media_runs import ask
from tests.helpers.processors import png_head

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
NUMBER, ROW = 12, 7  # records, and which of them is bad, from 1
LENGTH = 64


IMAGE = {"type": "image", "image": "bad.png"}
TEXT = {"type": "text", "text": "What?"}
FILES = {
    "unreadable": (b"no image", "bad.png: it is no image that Pillow knows"),
    "zero-size": (png_head(0, 0), "bad.png: it is (no image|damaged)"),
    "too wide": (png_head(10, 50_000), "bad.png: it is 50000 x 10, more than 32767 pixels"),
    "a bomb": (png_head(20_000, 20_000), "bad.png: it is larger than Pillow decodes"),
}
RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (ask({"type": "image", "image": "gone.png"}, TEXT), "gone.png: cannot be read"),
    "offline": (
        ask({"type": "image", "image": "http://127.0.0.1:9/a.png"}, TEXT),
        "http://127.0.0.1:9/a.png: cannot be fetched",
    ),
    "more places": (
        ask({"type": "image", "image": "train_1_0.png"}, {"type": "text", "text": "<|image_pad|>"}),
        "2 places for 1 images",
    ),
    "fewer places": (
        {**ask(TEXT), "images": ["train_1_0.png"]},
        "0 places for images from a column, the record 1",
    ),
}
TRUNCATED = "truncated", "bad.png: it is damaged"
MESSAGES = {name: text for name, (_, text) in (FILES | RECORDS).items()} | dict([TRUNCATED])


def write_case(folder: Path, name: str) -> Path:
    """A folder with records, of which one is bad."""
    folder.mkdir(parents=True)
    media_runs.write_questions(folder / "train.jsonl", NUMBER)
    rows = (folder / "train.jsonl").read_text().splitlines()
    if name in RECORDS:
        rows[ROW - 1] = json.dumps(RECORDS[name][0])
    else:
        rows[ROW - 1] = json.dumps(ask(IMAGE, TEXT))
        good = (folder / "train_1_0.png").read_bytes()
        (folder / "bad.png").write_bytes(FILES[name][0] if name in FILES else good[:-40])
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


@dataclass(frozen=True)
class Case:
    """How a loader comes to the bad record.

    Args:
        name: What is bad.
        kind: `datasets_type`.
        workers: Processes that load.
        is_silent: Bad records are skipped.
    """

    name: str
    kind: str = "mapping"
    workers: int = 0
    is_silent: bool = False

    def __str__(self) -> str:
        way = "skipped" if self.is_silent else "refused"
        return f"{self.name}, {self.kind}, {self.workers} workers, {way}"


PREPARED = [Case(name, is_silent=s) for name in (*FILES, *RECORDS) for s in (False, True)]
LOADED = [
    Case("truncated", kind, workers, is_silent=is_silent)
    for kind in ("mapping", "iterable")
    for workers in (0, 2)
    for is_silent in (False, True)
]
STREAMED = [Case(name, "iterable", is_silent=s) for name in FILES for s in (False, True)]
CASES = [*PREPARED, *LOADED, *STREAMED]


def load(folder: Path, case: Case, topology: Topology) -> dict[str, Any]:
    """What this rank reads of a case, and what stops it."""
    media = MediaProcessor(load_processor(str(folder / "model")))
    bad: list[BadRecord] = []
    os.environ["OMNILIT_CACHE"] = str(folder / f"cache {case}")
    train = TrainingArguments(micro_batch_size=1)
    factory = LoaderFactory(
        LoaderSettings(
            train,
            DataloaderConfig(num_workers=case.workers),
            budget=LENGTH,
            epoch_size=None if case.kind == "mapping" else 4 * LENGTH * NUMBER,
            buffer_size=4,
            is_buffer_size_given=False,
            collator=None,
        ),
        Preparation(
            {"train": str(folder / case.name / "train.jsonl"), "eval": None},
            TransformSettings(max_seq_len=LENGTH),
            case.kind,
            None,
            silent_exception=case.is_silent,
            max_bad_fraction=0.5,
            on_bad=bad.extend,
        ),
        topology,
        media.processor.tokenizer,
        media,
    )
    rows, error = [], None
    try:
        for batch in factory.train_loader(1):
            rows += [origin.row for origin in batch.origins]
    except DataError as found:
        error = found
    return {"rows": rows, "error": error, "bad": bad}


def fit(folder: Path, part: str, *, is_silent: bool) -> dict[str, Any]:
    """A whole run, whose training or evaluation data has an image that lost its end."""
    data = {f"{name}_path": str(folder / "whole" / "train.jsonl") for name in ("train", "eval")}
    data[f"{part}_path"] = str(folder / TRUNCATED[0] / "train.jsonl")
    out = folder / f"{part} {is_silent}"
    steps, error = [], None
    try:
        log, _ = training.train(
            folder,
            training.arguments(out, global_batch_size=2, eval_epochs=1),
            module_class=VLMModule,
            data={
                **data,
                "train_size": None,
                "dataloader": DataloaderConfig(num_workers=2),
                "silent_exception": is_silent,
                "max_bad_fraction": 0.5,
            },
        )
        steps = training.numbers(log)
    except DataError as found:
        error = found
    return {"steps": steps, "error": error}


def run(folder: Path) -> dict[str, dict[str, Any]]:
    multiprocessing.set_start_method("fork", force=True)  # a fork server imports torch anew
    stream.SHARD_BYTES = 512  # a rank is a process of its own
    topology = Topology.build(ParallelSizes(), torch.device("cpu"))
    found = {str(case): load(folder, case, topology) for case in CASES}
    for is_silent in (True, False):
        for part in ("train", "eval"):
            found[f"{part} {is_silent}"] = fit(folder, part, is_silent=is_silent)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    media_runs.write_seeing_model(folder / "model")
    for name in MESSAGES:
        write_case(folder / name, name)
    (folder / "whole").mkdir()
    media_runs.write_questions(folder / "whole" / "train.jsonl", NUMBER)
    return folder


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    return run_ranks(run, 2, folder, tmp_path=tmp_path_factory.mktemp("two"), timeout_s=150)


def check_error(error: object, folder: Path, name: str) -> None:
    """It names the record and its file, and the medium in it."""
    assert isinstance(error, DataError)
    assert re.match(f"{folder}/{name}/train.jsonl:{ROW}: .*{MESSAGES[name]}", str(error)), error


@pytest.mark.parametrize("case", [c for c in CASES if not c.is_silent], ids=str)
def test_both_ranks_are_told_which_record_is_bad(case, folder, ranks):
    for rank in ranks:
        check_error(rank[str(case)]["error"], folder, case.name)


@pytest.mark.parametrize("case", [c for c in CASES if c.is_silent], ids=str)
def test_both_ranks_read_on_without_it(case, ranks):
    found = [rank[str(case)] for rank in ranks]
    assert [one["error"] for one in found] == [None, None]
    assert {row for one in found for row in one["rows"]} == {*range(1, NUMBER + 1)} - {ROW}
    assert all(one["rows"] for one in found)
    bad = {(Path(one.file).name, one.row) for rank in found for one in rank["bad"]}
    assert bad == {("train.jsonl", ROW)}
    reasons = {one.reason for rank in found for one in rank["bad"]}
    assert all(re.search(MESSAGES[case.name], reason) for reason in reasons), reasons


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_run_stops_on_both_ranks_or_goes_on_without_it(part, folder, ranks):
    for rank in ranks:
        check_error(rank[f"{part} False"]["error"], folder, TRUNCATED[0])
        assert rank[f"{part} True"]["error"] is None
    steps = [rank[f"{part} True"]["steps"] for rank in ranks]
    assert len(steps[0]) > 2
    assert steps[0] == steps[1]
    told = list(read_quarantine(folder / f"{part} True" / "quarantine.jsonl"))
    assert [(Path(one.file).name, one.row) for one in told] == [("train.jsonl", ROW)]
