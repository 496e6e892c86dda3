"""Runs that are saved at one layout and resumed at another, and what records they read."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from omnilit.config import DataloaderConfig
from omnilit.data.streams import stream
from omnilit.testing import run_ranks
from tests.helpers import training

NUM_RECORDS = {"a": 60, "b": 25}
KINDS = ("mapping", "iterable", "iterable in shards", "multisource", "multisource stream")
IN_SHARDS = ("iterable in shards", "multisource stream")
Read = tuple[str, str, int]  # source, file, row


class Layout(NamedTuple):
    """Processes, and workers of each."""

    ranks: int
    workers: int

    def __str__(self) -> str:
        return f"{self.ranks}x{self.workers}"


class Steps(Callback):
    """Notes what this rank reads in each step, as soon as the step is done."""

    def __init__(self) -> None:
        self.by_step: list[list[Read]] = []
        self._open: list[Read] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._open += [(o.source, Path(o.file).name, o.row) for o in batch.origins]
        if batch.stamp.index == batch.stamp.size - 1:
            self.by_step.append(self._open)
            self._open = []


def write_data(folder: Path) -> None:
    """A model, two files, and a mixture of them in which every record comes at least once."""
    training.write_model(folder / "model")
    for seed, (name, number) in enumerate(NUM_RECORDS.items()):
        training.write_conversations(folder / f"{name}.jsonl", number, seed=seed)
    mixture = {
        "sources": [str(folder / f"{name}.jsonl") for name in NUM_RECORDS],
        "names": list(NUM_RECORDS),
        "schedule": [{"schedule_type": "const", "weights": [0.7, 0.3]}],
        "stopping_strategy": "all_exhausted",
    }
    (folder / "mix.yaml").write_text(yaml.safe_dump(mixture))


def data_arguments(kind: str, folder: Path) -> dict[str, Any]:
    """The `data` group of a kind of data."""
    path = folder / ("mix.yaml" if kind.startswith("multisource") else "a.jsonl")
    data: dict[str, Any] = {"train_path": str(path), "train_size": None}
    if kind in {"iterable", *IN_SHARDS}:
        data |= {"datasets_type": "iterable", "dyn_bsz_buffer_size": 7}
    return data


def read_steps(
    folder: str, kind: str, workers: int, out: str, over: dict[str, Any], load: str | None
) -> list[list[Read]]:
    """What this rank reads in each step of a run."""
    if workers:  # a fork server would import torch anew in each
        multiprocessing.set_start_method("fork", force=True)
    if kind in IN_SHARDS:
        stream.SHARD_BYTES = 2048  # a rank is a process of its own
    steps, place = Steps(), Path(folder)
    training.train(
        place,
        training.arguments(place / out, **{"global_batch_size": 4, **over}),
        data={
            **data_arguments(kind, place),
            "dataloader": DataloaderConfig(num_workers=workers),
        },
        load_path=None if load is None else place / load,
        callbacks=(steps,),
    )
    assert dist.is_initialized()
    return steps.by_step


def run(
    folder: Path,
    kind: str,
    layout: Layout,
    out: str,
    *,
    over: dict[str, Any],
    load: str | None = None,
) -> list[Counter[Read]]:
    """What all ranks together read in each step."""
    arguments = (str(folder), kind, layout.workers, out, over, load)
    ranks = run_ranks(read_steps, layout.ranks, *arguments, tmp_path=folder, timeout_s=170)
    return [Counter(read for step in steps for read in step) for steps in zip(*ranks, strict=True)]


def count_differences(expected: list[Counter[Read]], found: list[Counter[Read]]) -> tuple[int, int]:
    """Records that were lost, and records that came too often; in any step."""
    assert len(expected) == len(found), (len(expected), len(found))
    pairs = list(zip(expected, found, strict=True))
    return sum((a - b).total() for a, b in pairs), sum((b - a).total() for a, b in pairs)


def all_records(folder: Path, kind: str) -> set[Read]:
    """Every record that the data of a kind has."""
    names = list(NUM_RECORDS) if kind.startswith("multisource") else ["a"]
    found = set()
    for name in names:
        source = name if len(names) > 1 else "train"
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert all(json.loads(line) for line in lines)
        found |= {(source, f"{name}.jsonl", row) for row in range(1, len(lines) + 1)}
    return found


def shuffled_layouts(seed: int = 0) -> list[Layout]:
    """All layouts of the matrix, in an order that is none of theirs."""
    layouts = [Layout(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 2)]
    random.Random(seed).shuffle(layouts)
    return layouts
