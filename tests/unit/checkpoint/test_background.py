"""Writes beside training: what they hold, when they show, and how they fail."""

import random
import threading

import pytest
import torch
from torch import nn

from omnilit.checkpoint import dcp
from omnilit.checkpoint.background import BackgroundWriter
from omnilit.checkpoint.data_state import DataState, capture_random
from omnilit.checkpoint.layout import find_latest, step_folder
from omnilit.checkpoint.manifest import COMPLETE
from omnilit.checkpoint.save import DataRank, take_snapshot, write_snapshot
from omnilit.errors import CheckpointError
from tests.helpers.writers import FullDisk, SlowWriter

CPU = torch.device("cpu")


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(dcp, "FileSystemWriter", SlowWriter)
    SlowWriter.may_write.clear()
    SlowWriter.has_begun.clear()
    return SlowWriter


@pytest.fixture
def writer():
    writer = BackgroundWriter(timeout_s=20)
    yield writer
    SlowWriter.may_write.set()
    writer.close()


class Run:
    """A model that trains, and the mutable states that a checkpoint is made of."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.meta = {"callbacks": {"seen": [0]}, "position": {"step": 0}}
        self.loader = {"window": {"index": 0}}

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(torch.randn(4, 3)).square().mean() * random.random()).backward()
            self.optimizer.step()
            self.meta["position"]["step"] += 1
            self.meta["callbacks"]["seen"].append(len(self.meta["callbacks"]["seen"]))
            self.loader["window"]["index"] += 1

    def snapshot(self):
        return take_snapshot(
            models={"model": self.model},
            optimizers={"main": self.optimizer},
            meta=self.meta,
            data=DataState(self.loader, capture_random(CPU)),
            data_rank=DataRank(rank=0, size=1),
            files={"config.yaml": "a: 1\n"},
        )


def content(folder):
    """The bytes of every file, but for two: torch numbers each save in .metadata, and its seal."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {COMPLETE, ".metadata", "__0_0.distcp", "meta.pt"}
    same = [path for path in files if path.name not in {COMPLETE, ".metadata"}]
    return {str(path.relative_to(folder)): path.read_bytes() for path in same}


def test_what_is_saved_is_the_moment_of_the_save_to_the_bit(tmp_path, slow, writer):
    run = Run()
    run.train(2)
    slow.may_write.set()
    at_once = step_folder(tmp_path / "at_once", 2)
    write_snapshot(at_once, run.snapshot())
    slow.may_write.clear()
    beside = step_folder(tmp_path / "beside", 2)
    writer.start(beside, run.snapshot().copied())
    assert slow.has_begun.wait(20)
    run.train(3)
    assert find_latest(tmp_path / "beside").path is None
    slow.may_write.set()
    writer.finish()
    assert content(beside) == content(at_once)
    assert find_latest(tmp_path / "beside").path == beside


def test_one_is_in_flight_and_the_next_waits_for_it(tmp_path, slow, writer):
    run = Run()
    first, second = step_folder(tmp_path, 1), step_folder(tmp_path, 2)
    writer.start(first, run.snapshot().copied())
    timer = threading.Timer(0.1, slow.may_write.set)
    timer.start()
    writer.start(second, run.snapshot().copied())
    timer.join()
    assert (first / COMPLETE).is_file()
    writer.finish()
    assert (second / COMPLETE).is_file()


def fail(folder):
    """Make a folder that cannot be filled: a file has its place."""
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("in the way")


def check_often(writer):
    while True:
        writer.check(CPU)


def test_a_failure_surfaces_at_the_next_check_and_once(tmp_path, writer):
    fail(tmp_path / "out")
    final = step_folder(tmp_path / "out", 1)
    writer.start(final, Run().snapshot().copied())
    with pytest.raises(CheckpointError, match="global_step_1 was not saved in the background: the"):
        check_often(writer)
    writer.check(CPU)
    writer.finish()


def test_a_check_does_not_wait(tmp_path, slow, writer):
    writer.start(step_folder(tmp_path, 1), Run().snapshot().copied())
    assert slow.has_begun.wait(20)
    writer.check(CPU)
    assert find_latest(tmp_path).path is None


def test_the_next_save_raises_what_the_last_one_left(tmp_path, writer):
    fail(tmp_path / "out")
    writer.start(step_folder(tmp_path / "out", 1), Run().snapshot().copied())
    with pytest.raises(CheckpointError, match="global_step_1 was not saved"):
        writer.start(step_folder(tmp_path / "good", 2), Run().snapshot().copied())


def test_at_the_end_of_a_failed_run_the_write_is_waited_for_and_a_failure_told(
    tmp_path, writer, caplog, monkeypatch
):
    monkeypatch.setattr("omnilit.checkpoint.background.logger.propagate", True)
    monkeypatch.setattr("omnilit.checkpoint.background.logger.parent.propagate", True)
    writer.start(step_folder(tmp_path, 1), Run().snapshot().copied())
    writer.close()
    assert (step_folder(tmp_path, 1) / COMPLETE).is_file()
    fail(tmp_path / "out")
    writer.start(step_folder(tmp_path / "out", 2), Run().snapshot().copied())
    writer.close()
    assert "global_step_2 was not saved in the background" in caplog.text


def test_old_checkpoints_go_only_once_the_new_one_is_complete(tmp_path, slow, writer):
    run = Run()
    slow.may_write.set()
    old = step_folder(tmp_path, 1)
    write_snapshot(old, run.snapshot(), keep_last=1)
    slow.may_write.clear()
    writer.start(step_folder(tmp_path, 2), run.snapshot().copied(), keep_last=1)
    assert slow.has_begun.wait(20)
    assert find_latest(tmp_path).path == old
    slow.may_write.set()
    writer.finish()
    assert [path.name for path in old.parent.iterdir()] == ["global_step_2"]


def test_a_save_that_fails_leaves_the_only_good_checkpoint(tmp_path, writer, monkeypatch):
    old = step_folder(tmp_path, 1)
    write_snapshot(old, Run().snapshot())
    monkeypatch.setattr(dcp, "FileSystemWriter", FullDisk)
    writer.start(step_folder(tmp_path, 2), Run().snapshot().copied(), keep_last=1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.finish()
    assert find_latest(tmp_path).path == old
    assert [path.name for path in old.parent.iterdir()] == ["global_step_1"]
