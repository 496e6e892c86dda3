import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from omnilit.errors import OmniError
from omnilit.parallel.materialize import fill, fill_parameter, named_tensors

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


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize(
    "placements",
    [(Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0))],
)
def test_a_rank_takes_its_part_under_any_placement(rank, placements):
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
    finally:
        dist.destroy_process_group()
