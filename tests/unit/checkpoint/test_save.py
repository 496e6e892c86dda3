import pickle

import pytest
import torch
from torch import nn

from omnilit.checkpoint.data_state import DataState
from omnilit.checkpoint.dcp import load_model
from omnilit.checkpoint.layout import find_latest, step_folder
from omnilit.checkpoint.save import (
    DataRank,
    load_checkpoint,
    read_meta,
    saved_step,
    take_snapshot,
    write_snapshot,
)
from omnilit.errors import CheckpointError

ONE = DataRank(rank=0, size=1)
DATA = DataState(loader={"window": 3}, random=None)


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(6, width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embed.weight
        self.fc = nn.Linear(width, width)
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("left_out", torch.randn(3), persistent=False)

    def forward(self, ids):
        return self.head(self.fc(self.embed(ids)))


def make(seed, steps=0, width=4):
    torch.manual_seed(seed)
    model = Tied(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()


def save(tmp_path, model, optimizer, **changes):
    final = step_folder(tmp_path, 3)
    options = {
        "models": {"policy": model},
        "optimizers": {"main": optimizer},
        "meta": {"step": 3, "score": torch.tensor(0.5)},
        "data": DATA,
        "data_rank": ONE,
        "files": {"config.yaml": "train: {}\n"},
    }
    write_snapshot(final, take_snapshot(**{**options, **changes}))
    return final


def load(final, model, optimizer, name="policy"):
    return load_checkpoint(
        final, models={name: model}, optimizers={"main": optimizer}, data_rank=ONE
    )


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = make(1, steps=3)
    final = save(tmp_path, model, optimizer)
    other, other_optimizer = make(2)
    loaded = load(final, other, other_optimizer)
    for one, two in ((model, optimizer), (other, other_optimizer)):
        train(one, two, 2)
    expected = model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in other.state_dict().items())
    assert other.head.weight is other.embed.weight
    assert (loaded.meta["step"], loaded.meta["score"].item()) == (3, 0.5)
    assert loaded.data.loaders == ({"window": 3},)


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    final = save(tmp_path, *make(1))
    model, optimizer = make(2, steps=1)
    load(final, model, optimizer)
    assert not optimizer.state
    train(model, optimizer, 1)


def test_the_folder_holds_what_it_should_and_says_who_saved(tmp_path):
    final = save(tmp_path, *make(1, steps=1))
    names = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    assert names == {
        "COMPLETE",
        "config.yaml",
        "data_rank_00000.pt",
        "meta.pt",
        "tensors/.metadata",
        "tensors/__0_0.distcp",
    }
    assert find_latest(tmp_path).path == final
    by = read_meta(final)["saved_by"]
    assert (by["world_size"], by["data_size"]) == (1, 1)
    assert by["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_two_models_keep_apart(tmp_path):
    model, optimizer = make(1, steps=1)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    final = save(tmp_path, model, optimizer, models={"policy": model, "reference": frozen})
    other, other_optimizer = make(2)
    empty = nn.Linear(2, 2).requires_grad_(False)
    load_checkpoint(
        final,
        models={"policy": other, "reference": empty},
        optimizers={"main": other_optimizer},
        data_rank=ONE,
    )
    assert torch.equal(empty.weight, frozen.weight)


def test_one_model_is_read_on_its_own_and_in_another_type(tmp_path):
    model, optimizer = make(1, steps=1)
    final = save(tmp_path, model, optimizer, models={"policy": model, "other": nn.Linear(2, 2)})
    half = make(2)[0].to(torch.bfloat16)
    load_model(final / "tensors", half, name="policy")
    expected = model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in half.state_dict().items())
    with pytest.raises(CheckpointError, match=r"it lacks model\.third\.embed\.weight"):
        load_model(final / "tensors", half, name="third")


def test_another_models_checkpoint_is_refused_by_names(tmp_path):
    final = save(tmp_path, *make(1, steps=1))
    with pytest.raises(CheckpointError, match=r"lacks model\.other\.bias.* holds model\.policy"):
        load(final, nn.Linear(4, 4), make(1)[1], name="other")


def test_other_shapes_are_refused_with_both(tmp_path):
    final = save(tmp_path, *make(1))
    with pytest.raises(CheckpointError, match=r"embed\.weight is \[6, 4\], not \[6, 8\]"):
        load(final, *make(1, width=8))


def test_moments_of_a_parameter_that_is_frozen_now_are_refused(tmp_path):
    final = save(tmp_path, *make(1, steps=1))
    model, _ = make(2)
    model.fc.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.embed.weight], lr=0.1)
    with pytest.raises(CheckpointError, match=r"no parameter for .*policy\.fc\.bias"):
        load(final, model, optimizer)


def test_a_folder_without_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path, *make(1))


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="would hold more than plain values"):
        save(tmp_path, *make(1), meta={"step": nn.Linear(1, 1)})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "odd", [lambda: 0, {"count": (x for x in ())}], ids=["lambda", "generator"]
)
def test_a_value_that_cannot_be_pickled_leaves_nothing_either(tmp_path, odd):
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError), match="pickle"):
        save(tmp_path, *make(1), meta={"callbacks": odd})
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="the checkpoint failed: "):
        save(tmp_path, *make(1))


def test_an_evaluation_reads_the_weights_and_no_moments(tmp_path):
    model, optimizer = make(1, steps=2)
    final = save(tmp_path, model, optimizer)
    other, _ = make(2)
    load_checkpoint(final, models={"policy": other}, optimizers={}, data_rank=ONE)
    expected = model.state_dict()
    assert all(
        torch.equal(t, expected[n]) for n, t in other.state_dict().items() if n != "left_out"
    )


def test_the_step_of_a_checkpoint_is_known_under_any_name(tmp_path):
    final = save(tmp_path, *make(1), meta={"position": {"step": 7}})
    assert saved_step(final) == 3  # its name, which says what the run knows it as
    renamed = final.rename(tmp_path / "best")
    assert saved_step(renamed) == 7
    other = save(tmp_path, *make(1)).rename(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="odd does not say at which step it was saved"):
        saved_step(other)
