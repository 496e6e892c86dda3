import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from omnilit.errors import OmniError
from omnilit.parallel.materialize import (
    copy_overlap,
    fill,
    fill_parameter,
    move_unsharded,
    named_tensors,
    pieces,
)

CPU = torch.device("cpu")


def values(model, but=()):
    return [(n, torch.full_like(t, 3)) for n, t in named_tensors(model).items() if n not in but]


def test_every_tensor_gets_its_value_in_its_own_dtype():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    fill(
        model, [(n, torch.full(t.shape, 3.0)) for n, t in named_tensors(model).items()], device=CPU
    )
    assert all((t == 3).all() for t in model.state_dict().values())
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:-1], "1 tensors of the model got no value: bias"),
        (lambda v: [*v, v[0]], "weight is not a tensor that is to be filled, or it came twice"),
        (lambda v: [("odd", v[0][1]), *v], "odd is not a tensor"),
        (lambda v: [("weight", torch.ones(3, 2)), v[1]], r"weight has the shape \[2, 3\] and"),
    ],
)
def test_values_that_do_not_match_the_model_are_refused(change, message):
    model = nn.Linear(3, 2)
    with pytest.raises(OmniError, match=message):
        fill(model, change(values(model)), device=CPU)


def test_only_the_named_tensors_are_wanted():
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()
    fill(model, [("bias", torch.zeros(2))], device=CPU, names=["bias"])
    assert (model.bias == 0).all()
    assert torch.equal(model.weight, weight)


def test_another_shape_is_refused():
    with pytest.raises(OmniError, match=r"cannot fill shape \[2\] from \[3\]"):
        fill_parameter(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (3, 4, 5), (2, 0, 3), (0,)])
@pytest.mark.parametrize("max_numel", [1, 3, 8, 20, 1000, None])
def test_pieces_cover_a_tensor_once_and_are_as_large_as_allowed(shape, max_numel):
    counts, found = torch.zeros(shape, dtype=torch.int64), list(pieces(shape, max_numel))
    for box in found:
        counts[box] += 1
        assert max_numel is None or counts[box].numel() <= max_numel
        assert counts[box].is_contiguous()
    assert (counts == 1).all()
    rows = shape[0] if shape else 1
    if max_numel is None or counts.numel() <= max_numel:
        assert len(found) == 1
    elif counts[0].numel() <= max_numel:
        assert len(found) == -(-rows // (max_numel // counts[0].numel()))


@pytest.mark.parametrize("max_bytes", [1, 8, 24, 10**6])
def test_values_sent_in_pieces_are_the_values(max_bytes):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    wanted = {name: torch.rand(t.shape).to(t.dtype) for name, t in named_tensors(model).items()}
    fill(model, wanted.items(), device=CPU, max_bytes=max_bytes)
    assert all(torch.equal(t, wanted[name]) for name, t in named_tensors(model).items())


def test_what_is_offloaded_stays_while_the_rest_moves():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        mesh = init_device_mesh("cpu", (2,))
        for name in ("weight", "bias"):
            whole = getattr(model[0], name).detach()
            setattr(model[0], name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
        move_unsharded(model, torch.device("meta"))
        kinds = {name: tensor.device.type for name, tensor in named_tensors(model).items()}
    finally:
        dist.destroy_process_group()
    assert {name for name, kind in kinds.items() if kind == "cpu"} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize(
    "placements",
    [(Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0))],
)
@pytest.mark.parametrize("max_numel", [3, 14, None])
def test_a_rank_takes_its_part_under_any_placement_whole_or_in_pieces(rank, placements, max_numel):
    dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("a", "b"))
        full = torch.arange(35.0).reshape(5, 7)
        sharded = distribute_tensor(torch.zeros(5, 7), mesh, placements, src_data_rank=None)
        fill_parameter(sharded, full)
        expected = full
        for size, place, axis in zip((2, 3), mesh.get_coordinate() or (), placements, strict=True):
            if isinstance(axis, Shard):  # chunks as torch cuts them: ceil first, maybe none last
                parts = list(expected.chunk(size, axis.dim))
                empty = expected.narrow(axis.dim, 0, 0)
                expected = parts[place] if place < len(parts) else empty
        assert torch.equal(sharded.to_local(), expected)
        sharded.to_local().zero_()
        for box in pieces(full.shape, max_numel):
            copy_overlap(sharded, full[box], box)
        assert torch.equal(sharded.to_local(), expected)
    finally:
        dist.destroy_process_group()
