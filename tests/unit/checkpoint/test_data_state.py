import logging
import random

import numpy as np
import pytest
import torch

from omnilit.checkpoint.data_state import (
    DataState,
    capture_random,
    entry_name,
    load_data_state,
    pack_data_state,
    restore_random,
    seed_random,
)
from omnilit.checkpoint.stored import pack_plain, read_plain
from omnilit.errors import CheckpointError

CPU = torch.device("cpu")


def save(folder, state, *, data_rank):
    (folder / entry_name(data_rank)).write_bytes(pack_data_state(state, data_rank=data_rank))


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),  # noqa: NPY002 - libraries draw from it
        np.random.randn(),  # noqa: NPY002
        torch.rand(1).item(),
    ]


def test_random_states_go_on_where_they_were_after_a_round_trip(tmp_path):
    draw()  # leaves half a pair of normals in two of the generators
    state = DataState(loader={"window": 7}, random=capture_random(CPU))
    save(tmp_path, state, data_rank=3)
    expected = draw()
    loaded = load_data_state(tmp_path, data_rank=3, data_size=4, saved_data_size=4)
    assert loaded.random is not None
    restore_random(loaded.random, CPU)
    assert draw() == expected
    assert loaded.loaders == ({"window": 7},)


def test_another_number_of_ranks_keeps_the_position_and_starts_random_states_anew(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    caplog.set_level(logging.INFO, "omnilit")
    state = DataState(loader={"window": 7}, random=capture_random(CPU))
    save(tmp_path, state, data_rank=0)
    loaded = load_data_state(tmp_path, data_rank=3, data_size=4, saved_data_size=1)
    assert (loaded.loaders, loaded.random) == (({"window": 7},), None)
    assert "saved by 1 data ranks, now 4: random states start anew" in caplog.text


def test_a_loader_whose_ranks_each_know_a_part_gets_the_entries_of_all(tmp_path):
    for rank in range(3):
        state = DataState(loader={"per_rank": True, "mine": rank}, random={"of": rank})
        save(tmp_path, state, data_rank=rank)
    loaded = load_data_state(tmp_path, data_rank=1, data_size=3, saved_data_size=3)
    assert [loader["mine"] for loader in loaded.loaders] == [0, 1, 2]
    assert loaded.random == {"of": 1}
    other = load_data_state(tmp_path, data_rank=1, data_size=2, saved_data_size=3)
    assert [loader["mine"] for loader in other.loaders] == [0, 1, 2]
    assert other.random is None


def test_seeding_anew_depends_on_seed_step_and_rank():
    def seeded(*numbers):
        seed_random(seed=numbers[0], step=numbers[1], data_rank=numbers[2])
        return tuple(draw())

    cases = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
    assert len({seeded(*case) for case in cases}) == 4
    assert seeded(1, 2, 3) == seeded(1, 2, 3)


def test_a_missing_entry_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"data_rank_00001\.pt cannot be read"):
        load_data_state(tmp_path, data_rank=1, data_size=2, saved_data_size=2)


def test_a_file_that_is_no_entry_is_named(tmp_path):
    (tmp_path / "data_rank_00000.pt").write_bytes(pack_plain("odd.pt", {"odd": 1}))
    with pytest.raises(CheckpointError, match=r"data_rank_00000\.pt is not the state of"):
        load_data_state(tmp_path, data_rank=0, data_size=1, saved_data_size=1)


class Stranger:
    pass


def test_what_could_not_be_loaded_safely_is_refused_when_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"meta\.pt would hold more than plain.*Stranger"):
        pack_plain("meta.pt", {"a": Stranger()})
    assert not (tmp_path / "meta.pt").exists()


def test_a_file_that_would_run_code_is_not_loaded(tmp_path):
    torch.save({"a": Stranger()}, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt cannot be read.*Stranger"):
        read_plain(tmp_path / "meta.pt")
