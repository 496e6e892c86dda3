"""Ranks that read the same data share its state in a checkpoint, and their random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from omnilit.checkpoint.data_state import DataState, seed_random
from omnilit.checkpoint.save import load_checkpoint, take_snapshot, write_snapshot
from omnilit.config import AcceleratorConfig
from omnilit.parallel.mesh import Topology
from omnilit.strategies import OmniStrategy
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist


def save_and_load(folder: Path) -> tuple[int, list[str], int, int, float]:
    strategy = OmniStrategy(AcceleratorConfig(ulysses_size=2))
    strategy._topology = Topology.build(strategy.sizes, torch.device("cpu"))
    own = strategy._data_rank()
    models = {"model": nn.Linear(2, 2)}
    snapshot = take_snapshot(
        models=models,
        optimizers={},
        meta={},
        data=DataState(loader={}, random={"drawn_by": dist.get_rank(), "data_rank": own.rank}),
        data_rank=own,
        files={},
    )
    written = [name for name in snapshot.files if name.startswith("data_rank")]
    write_snapshot(folder / "global_step_1", snapshot)
    loaded = load_checkpoint(
        folder / "global_step_1", models=models, optimizers={}, data_rank=own
    ).data.random
    assert loaded is not None
    seed_random(seed=3, step=0, data_rank=own.rank)
    return own.rank, written, loaded["data_rank"], loaded["drawn_by"], float(torch.rand(()))


def test_one_rank_of_those_that_read_the_same_data_writes_for_all(tmp_path: Path):
    found = run_ranks(save_and_load, 4, tmp_path / "checkpoints", tmp_path=tmp_path)
    assert [rank for rank, *_ in found] == [0, 0, 1, 1]
    names = [written for _, written, *_ in found]
    assert names == [["data_rank_00000.pt"], [], ["data_rank_00001.pt"], []]
    assert [(data_rank, drawn_by) for _, _, data_rank, drawn_by, _ in found] == [
        (0, 0),
        (0, 0),
        (1, 2),
        (1, 2),
    ]
    drawn = [number for *_, number in found]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
