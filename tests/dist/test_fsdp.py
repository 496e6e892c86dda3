import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from omnilit.parallel.fsdp import set_gradient_sync, shard_model
from omnilit.parallel.grad_norm import clip_gradients, total_norm
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist


def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def inputs(rank, micro_batch):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * rank + micro_batch))


def reference(num_ranks):
    model = build()
    for rank in range(num_ranks):
        for micro_batch in range(2):
            model(inputs(rank, micro_batch)).square().sum().backward()
    return model


def accumulate_and_clip(max_norm):
    rank, model = dist.get_rank(), build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy()
    shard_model(model, units=[model[0]], mesh=mesh, policy=policy, reshard_after_forward=True)
    for micro_batch in range(2):
        set_gradient_sync(model, is_on=micro_batch == 1)
        model(inputs(rank, micro_batch)).square().sum().backward()
    norm = clip_gradients(model.parameters(), max_norm)
    after = total_norm(model.parameters())
    gradients = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
    return norm.item(), after.item(), gradients


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_are_the_sum_over_ranks_and_micro_batches(num_ranks, tmp_path):
    model = reference(num_ranks)
    expected = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    for norm, after, gradients in run_ranks(accumulate_and_clip, num_ranks, 0.0, tmp_path=tmp_path):
        assert norm == after == pytest.approx(expected.item(), rel=1e-6)
        for found, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad)


def test_clipping_scales_the_joined_norm_down_to_the_limit(tmp_path):
    expected = total_norm(reference(2).parameters()).item()
    for norm, after, _ in run_ranks(accumulate_and_clip, 2, 0.5, tmp_path=tmp_path):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert after == pytest.approx(0.5, rel=1e-5)


def test_a_norm_that_is_not_finite_scales_nothing():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([float("inf"), 1.0])
    assert clip_gradients([parameter], 1.0).isinf()
    assert parameter.grad[1] == 1.0
