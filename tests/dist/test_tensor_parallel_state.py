"""Values of matrices that are split over ranks: drawn, read, saved, moved to other layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from omnilit.checkpoint.dcp import load_tensors, named_state, save_tensors
from omnilit.models.build import build_meta
from omnilit.models.weights import Delivery, gather_weights, initial_tensors, load_weights
from omnilit.parallel.materialize import fill_parameter
from omnilit.parallel.pieces import gather, in_one_piece, is_in_pieces, take_from_one_piece
from omnilit.testing import run_ranks
from tests.helpers.models import tiny, tiny_config
from tests.helpers.spread import CPU, spread, topology_of

pytestmark = pytest.mark.dist
FAMILIES = ("qwen3_tied", "gpt_oss", "qwen3_moe")
TP = {"tp_size": 2}
DELIVERIES = ({"max_bytes": 10_000}, {"from_rank0": False})  # in pieces that end within a matrix
OWN = Delivery(from_rank0=False)
PLACEMENTS = (
    (Shard(0), Shard(1)),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (Shard(0), _StridedShard(1, split_factor=2)),
    (Replicate(), _StridedShard(1, split_factor=2)),
    (Shard(1), _StridedShard(0, split_factor=2)),
)


def place_everywhere():
    """For each placements: the tensor as filled, and as moved to one block a rank and back."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    whole, found = torch.arange(96.0).reshape(8, 12), []
    for placements in PLACEMENTS:
        tensor = distribute_tensor(torch.zeros(8, 12), mesh, placements)
        fill_parameter(tensor, whole)
        expected = distribute_tensor(whole, mesh, placements)
        moved = in_one_piece(tensor)
        assert isinstance(moved, DTensor)
        back = distribute_tensor(torch.zeros(8, 12), mesh, placements)
        take_from_one_piece(back, moved if moved is not tensor else back.copy_(tensor))
        parts = [t.to_local() for t in (tensor, expected, back)]
        wholes = [gather(t) for t in (tensor, moved, back)]
        found.append((is_in_pieces(tensor), is_in_pieces(moved), parts, wholes))
    return found


def test_every_placement_is_filled_with_its_own_part_and_gathers_to_the_whole(tmp_path):
    whole = torch.arange(96.0).reshape(8, 12)
    for found in run_ranks(place_everywhere, 4, tmp_path=tmp_path):
        assert [before for before, *_ in found] == [False, False, True, True, True]
        for _, after, (filled, expected, back), wholes in found:
            assert not after
            assert torch.equal(filled, expected)
            assert torch.equal(back, expected)
            assert all(torch.equal(gathered, whole) for gathered in wholes)


def blank(family, sizes):
    model = build_meta(tiny_config(family), dtype=torch.float32)
    spread(model, topology_of(**sizes))
    return model


def load_and_gather(family, path, delivery):
    model = blank(family, TP)
    load_weights(
        model, tiny_config(family), path=path, seed=5, device=CPU, delivery=Delivery(**delivery)
    )
    return gather_weights(model)


def load_in_every_way(folder):
    return {
        (family, way, index): load_and_gather(family, path, delivery)
        for family in FAMILIES
        for way, path in (("drawn", None), ("read", f"{folder}/{family}"))
        for index, delivery in enumerate(DELIVERIES)
    }


def is_bit_equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_split_weights_are_drawn_read_and_exported_to_the_bit(tmp_path):
    expected = {}
    for family in FAMILIES:
        model = tiny(family, seed=1)
        model.save_pretrained(tmp_path / family)
        expected[family, "read"] = gather_weights(model)
        blueprint = build_meta(tiny_config(family), dtype=torch.float32)
        saved, drawn = model.state_dict(), dict(initial_tensors(blueprint, seed=5))
        expected[family, "drawn"] = {n: t.clone() for n, t in drawn.items() if n in saved}
    found, *others = run_ranks(load_in_every_way, 4, str(tmp_path), tmp_path=tmp_path)
    assert len(found) == 12
    for (family, way, index), weights in found.items():
        assert is_bit_equal(weights, expected[family, way]), (family, way, DELIVERIES[index])
    assert not any(weights for other in others for weights in other.values())


def prepare(sizes, seed):
    """Joined, tied and plain weights of its own, and an optimizer that has made a step."""
    config = tiny_config("qwen3_moe", tie_word_embeddings=True, num_hidden_layers=1)
    model = build_meta(config, dtype=torch.float32)
    spread(model, topology_of(**sizes))
    load_weights(model, config, path=None, seed=seed, device=CPU, delivery=OWN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    state = named_state({"model": model}, {"optimizer": optimizer})
    return {name: gather(tensor).clone() for name, tensor in state.items()}


def load(folder, sizes):
    model, optimizer = prepare(sizes, seed=2)
    load_tensors(Path(folder), models={"model": model}, optimizers={"optimizer": optimizer})
    return everything(model, optimizer)


def save_and_load(folder, saved, loaded):
    """What was saved in one layout, and what each other one then holds."""
    path = Path(folder)
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    model, optimizer = prepare(saved, seed=1)
    save_tensors(path, named_state({"model": model}, {"optimizer": optimizer}))
    return [everything(model, optimizer), *(load(folder, sizes) for sizes in loaded)]


def move_between_layouts(folder):
    split, whole = f"{folder}/split", f"{folder}/whole"
    copies, experts = {**TP, "dp_replicate_size": 2}, {**TP, "ep_size": 2}
    return save_and_load(split, TP, [{}, copies, experts]), save_and_load(whole, {}, [TP])


def load_both(folder, sizes):
    return [load(f"{folder}/{name}", sizes) for name in ("split", "whole")]


def test_a_checkpoint_loads_in_every_layout_to_the_bit(tmp_path):
    on_four, *_ = run_ranks(move_between_layouts, 4, str(tmp_path), tmp_path=tmp_path)
    on_two, *_ = run_ranks(load_both, 2, str(tmp_path), TP, tmp_path=tmp_path)
    (on_one,) = run_ranks(load_both, 1, str(tmp_path), {}, tmp_path=tmp_path)
    for (saved, *loaded), two, one in zip(on_four, on_two, on_one, strict=True):
        assert any("experts.gate_up_proj.exp_avg_sq" in name for name in saved)
        for other in (*loaded, two, one):
            assert is_bit_equal(other, saved)
