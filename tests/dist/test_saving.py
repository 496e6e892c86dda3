"""Training while checkpoints are written and exported."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from omnilit.checkpoint import dcp
from omnilit.checkpoint.layout import find_latest, step_folder
from omnilit.errors import CheckpointError
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.writers import FullDisk

pytestmark = pytest.mark.dist


class Draws(Callback):
    """Notes a random number of every step, so that one that is drawn too much is seen."""

    def __init__(self):
        self.numbers = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.numbers.append(torch.rand(()).item())


def fit(folder, name, load=None, **checkpoint):
    place, draws = Path(folder), Draws()
    arguments = training.arguments(place / name, checkpoint=checkpoint, max_steps=4)
    log, module = training.train(place, arguments, load_path=load, callbacks=(draws,))
    return training.numbers(log), draws.numbers, training.weights_of(module)


def fit_in_three_ways(folder):
    at_once = fit(folder, "at_once", save_steps=2)
    writes = {"save_steps": 2, "save_async": True, "hf_save_steps": 1, "save_hf_weights": True}
    beside = fit(folder, "beside", **writes)
    resumed = fit(folder, "resumed", load=step_folder(Path(folder) / "beside", 2))
    return at_once, beside, resumed


@pytest.fixture
def task(tmp_path):
    training.write_model(tmp_path / "model")
    training.write_conversations(tmp_path / "train.jsonl", 30)
    return tmp_path


def stored(folder):
    files = [*(folder / "tensors").glob("*.distcp"), *folder.glob("data_rank_*.pt")]
    return {path.name: path.read_bytes() for path in files}


def test_writing_beside_training_and_exporting_change_nothing_but_the_time(task):
    ranks = run_ranks(fit_in_three_ways, 2, str(task), tmp_path=task)
    for at_once, beside, resumed in ranks:
        assert at_once[:2] == beside[:2]
        assert training.is_bit_equal(at_once[2], beside[2])
        assert resumed[0] == at_once[0][2:]
        assert training.is_bit_equal(resumed[2], at_once[2])
    for step in (2, 4):
        folders = [step_folder(task / name, step) for name in ("at_once", "beside")]
        one, other = map(stored, folders)
        assert one == other
        assert len(one) == 4
    exports = sorted(path.parent.name for path in (task / "beside").glob("checkpoints/*/hf_ckpt"))
    assert exports == [f"global_step_{step}" for step in (1, 2, 3, 4)]
    assert find_latest(task / "beside").path == step_folder(task / "beside", 4)


def fit_on_a_full_disk(folder, save_steps):
    if dist.get_rank() == 1:
        dcp.FileSystemWriter = FullDisk
    steps = training.StepLog()
    checkpoint = {"save_steps": save_steps, "save_async": True}
    arguments = training.arguments(Path(folder) / "run", checkpoint=checkpoint, max_steps=4)
    with pytest.raises(CheckpointError, match=r"not saved in the background: .*No space left"):
        training.train(Path(folder), arguments, callbacks=(steps,))
    return [result.step for result in steps.results]


@pytest.mark.parametrize("save_steps", [1, 4])  # the first step; the last one, with none after it
def test_a_write_that_fails_ends_the_run_on_all_ranks_after_the_same_step(save_steps, task):
    one, other = run_ranks(fit_on_a_full_disk, 2, str(task), save_steps, tmp_path=task)
    assert one == other
    assert one == ([1, 2] if save_steps == 1 else [1, 2, 3, 4])
    assert find_latest(task / "run").path is None
