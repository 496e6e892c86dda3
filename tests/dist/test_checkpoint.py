import pickle
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from omnilit.checkpoint.data_state import DataState
from omnilit.checkpoint.layout import find_latest, step_folder
from omnilit.checkpoint.save import (
    DataRank,
    load_checkpoint,
    take_snapshot,
    write_snapshot,
)
from omnilit.cli.run_folder import RunFiles, RunFolder
from omnilit.errors import CheckpointError, OmniError
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist


def make(mesh_shape, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5, bias=False))
    names = ("replicate", "shard")[-len(mesh_shape) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.arange(6.0).reshape(2, 3) + step  # the same on every rank
        model(inputs).square().mean().backward()
        optimizer.step()


def full(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def everything(model, optimizer):
    state = {name: full(p.detach()) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"{name}.{key}"] = full(value)
    return state


def here():
    return DataRank(rank=dist.get_rank(), size=dist.get_world_size())


def save(folder, mesh_shape):
    model, optimizer = make(mesh_shape, seed=1)
    train(model, optimizer, 3)
    snapshot = take_snapshot(
        models={"model": model},
        optimizers={"main": optimizer},
        meta={"step": 3},
        data=DataState(loader={"window": 3}, random={"mine": dist.get_rank()}),
        data_rank=here(),
        files={"config.yaml": "a: 1\n"},
    )
    write_snapshot(step_folder(Path(folder), 3), snapshot)
    return everything(model, optimizer)


def load(folder, mesh_shape):
    model, optimizer = make(mesh_shape, seed=2)
    loaded = load_checkpoint(
        step_folder(Path(folder), 3),
        models={"model": model},
        optimizers={"main": optimizer},
        data_rank=here(),
    )
    before = everything(model, optimizer)
    train(model, optimizer, 1)
    return before, everything(model, optimizer), loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    expected, _ = run_ranks(save, 2, str(folder), (2,), tmp_path=folder)
    return folder, expected


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (2, 2)])
def test_two_ranks_save_and_any_mesh_goes_on(saved, mesh_shape, tmp_path):
    folder, expected = saved
    num_ranks = {(1,): 1, (2,): 2, (2, 2): 4}[mesh_shape]
    results = run_ranks(load, num_ranks, str(folder), mesh_shape, tmp_path=tmp_path)
    for rank, (before, after, loaded) in enumerate(results):
        assert before.keys() == expected.keys()
        assert all(torch.equal(before[name], expected[name]) for name in expected)
        assert [after[n].item() for n in after if n.endswith(".step")] == [4, 4, 4]
        assert loaded.meta["step"] == loaded.data.loaders[0]["window"] == 3
        assert loaded.data.random == ({"mine": rank} if num_ranks == 2 else None)


def test_each_rank_has_files_of_its_own_in_a_whole_checkpoint(saved):
    found = find_latest(saved[0]).path
    assert found is not None
    assert found == step_folder(saved[0], 3)
    names = {path.name for path in found.rglob("*")}
    assert names >= {"__0_0.distcp", "__1_0.distcp", "data_rank_00000.pt", "data_rank_00001.pt"}


def save_on_a_full_disk(folder, failing):
    if dist.get_rank() == 1:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (failing, hard))
    with pytest.raises(CheckpointError) as caught:
        save(folder, (2,))
    return str(caught.value)


@pytest.mark.parametrize("failing", [16, 3000])  # bytes: the shard fails, or only the data entry
def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing(failing, tmp_path):
    messages = run_ranks(save_on_a_full_disk, 2, str(tmp_path / "out"), failing, tmp_path=tmp_path)
    assert all("File too large" in message or "rank 1" in message for message in messages)
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def save_what_one_rank_cannot_pickle(odd_rank):
    model, optimizer = make((2,), seed=1)
    odd = {"odd": lambda: 0} if dist.get_rank() == odd_rank else {}
    with pytest.raises((AttributeError, pickle.PicklingError, OmniError)) as caught:
        take_snapshot(
            models={"model": model},
            optimizers={"main": optimizer},
            meta={},
            data=DataState(loader={}, random=odd),
            data_rank=here(),
            files={},
        )
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("odd_rank", [0, 1])
def test_an_error_that_is_not_ours_ends_the_save_on_all_ranks(odd_rank, tmp_path):
    said = run_ranks(save_what_one_rank_cannot_pickle, 2, odd_rank, tmp_path=tmp_path, timeout_s=20)
    (own, reason), (other, told) = said[odd_rank], said[1 - odd_rank]
    assert (own != "OmniError", other) == (True, "OmniError")
    assert told == f"rank {odd_rank} failed: {own}: {reason}"


def prepare_with_a_broken_tokenizer(folder):
    module: Any = SimpleNamespace(model_config=Broken(), tokenizer=Broken())
    trainer: Any = SimpleNamespace(
        is_global_zero=dist.get_rank() == 0, fast_dev_run=False, loggers=[]
    )
    files = RunFiles(Path(folder), {}, {}, load_path=None, is_overwrite=False)
    with pytest.raises((ValueError, OmniError)) as caught:
        RunFolder(files).setup(trainer, module, "fit")
    return str(caught.value)


class Broken:
    def save_pretrained(self, folder):
        raise ValueError("the generation config is invalid")


def test_a_tokenizer_that_cannot_be_saved_ends_the_run_on_all_ranks(tmp_path):
    said = run_ranks(
        prepare_with_a_broken_tokenizer, 2, str(tmp_path / "out"), tmp_path=tmp_path, timeout_s=20
    )
    reason = "the generation config is invalid"
    assert said == [reason, f"rank 0 failed: ValueError: {reason}"]
