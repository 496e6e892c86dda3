"""Checkpoints that several ranks write beside training."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from omnilit.checkpoint import dcp
from omnilit.checkpoint.background import BackgroundWriter
from omnilit.checkpoint.data_state import DataState
from omnilit.checkpoint.layout import find_latest, step_folder
from omnilit.checkpoint.manifest import COMPLETE
from omnilit.checkpoint.save import take_snapshot, write_snapshot
from omnilit.errors import CheckpointError
from omnilit.testing import run_ranks
from tests.dist.test_checkpoint import everything, here, make, train
from tests.helpers.writers import FullDisk, SlowWriter

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")


def snapshot_of(model, optimizer):
    return take_snapshot(
        models={"model": model},
        optimizers={"main": optimizer},
        meta={"step": 3},
        data=DataState(loader={"window": 3}, random={"mine": dist.get_rank()}),
        data_rank=here(),
        files={},
    )


def save_beside_training(folder, mesh_shape, slow_rank):
    model, optimizer = make(mesh_shape, seed=1)
    train(model, optimizer, 3)
    at_once, beside = step_folder(Path(folder) / "once", 3), step_folder(Path(folder) / "beside", 3)
    write_snapshot(at_once, snapshot_of(model, optimizer))
    if dist.get_rank() == slow_rank:
        dcp.FileSystemWriter = SlowWriter
    writer = BackgroundWriter(timeout_s=20)
    writer.start(beside, snapshot_of(model, optimizer).copied())
    for _ in range(5):  # collectives of the default group, while the threads are in theirs
        train(model, optimizer, 1)
        writer.check(CPU)
    early = find_latest(Path(folder) / "beside")
    dist.barrier()
    SlowWriter.may_write.set()
    train(model, optimizer, 1)
    writer.finish()
    found = {}
    for path in (at_once, beside):
        other, other_optimizer = make(mesh_shape, seed=2)
        tensors = path / "tensors"
        models, optimizers = {"model": other}, {"main": other_optimizer}
        dcp.load_tensors(tensors, models=models, optimizers=optimizers)
        small = {p.name: p.read_bytes() for p in path.iterdir() if p.suffix == ".pt"}
        found[path] = everything(other, other_optimizer), small
    writer.close()
    return early, *found.values()


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_what_ranks_write_beside_training_is_what_they_write_at_once(slow_rank, tmp_path):
    results = run_ranks(save_beside_training, 2, str(tmp_path), (2,), slow_rank, tmp_path=tmp_path)
    for early, (tensors, small), (other_tensors, other_small) in results:
        assert early.path is None  # nothing shows before the slowest rank is done
        assert small == other_small
        assert len(small) == 3
        assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    assert find_latest(tmp_path / "beside").path == step_folder(tmp_path / "beside", 3)


def save_on_a_disk_that_fills(folder):
    model, optimizer = make((2,), seed=1)
    train(model, optimizer, 1)
    if dist.get_rank() == 1:
        dcp.FileSystemWriter = FullDisk
    writer = BackgroundWriter(timeout_s=20)
    writer.start(step_folder(Path(folder), 1), snapshot_of(model, optimizer).copied())
    for step in range(10_000):
        train(model, optimizer, 1)  # hangs where the other rank has left already
        try:
            writer.check(CPU)
        except CheckpointError as error:
            return step, str(error)
    return None


def test_one_rank_that_cannot_write_ends_all_at_the_same_step(tmp_path):
    out = tmp_path / "out"
    (step, message), (other_step, other_message) = run_ranks(
        save_on_a_disk_that_fills, 2, str(out), tmp_path=tmp_path
    )
    assert step == other_step
    for text in (message, other_message):
        assert "global_step_1 was not saved in the background" in text
        assert "No space left on device" in text
    assert list((out / "checkpoints").iterdir()) == []


def write_until_killed(folder, pipe):
    dcp.FileSystemWriter = SlowWriter
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    writer = BackgroundWriter(timeout_s=20)
    writer.start(step_folder(Path(folder), 1), snapshot_of(model, optimizer).copied())
    assert SlowWriter.has_begun.wait(20)
    pipe.send("writing")
    writer.finish()


def test_a_run_that_is_killed_while_it_writes_leaves_nothing_that_auto_takes(tmp_path):
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=write_until_killed, args=(str(tmp_path), sender))
    process.start()
    assert receiver.poll(40)
    process.kill()
    process.join()
    staged = list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in staged] == [".staging-global_step_1"]
    assert not list(tmp_path.rglob(COMPLETE))
    assert find_latest(tmp_path).path is None
