from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omnilit.parallel.fsdp import set_gradient_sync, set_resharding, shard_model
from omnilit.parallel.grad_norm import _sum_over, clip_gradients, group_norms, total_norm
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


def copies_of_gradients():
    """Elements that one backward pass copies from tensor to tensor, of the same size or larger."""
    model = build()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy()
    shard_model(model, units=[], mesh=mesh, policy=policy, reshard_after_forward=False)
    loss = model(inputs(0, 0)).square().sum()
    with CountCopies() as copies:
        loss.backward()
    return copies.numel, sum(parameter.numel() for parameter in model.parameters())


class CountCopies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[0] is not args[1]:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_one_rank_copies_no_gradient_to_itself(tmp_path):
    [(numel, num_parameters)] = run_ranks(copies_of_gradients, 1, tmp_path=tmp_path)
    assert numel < num_parameters


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


def spread(mesh_shape):
    """Gradients over a mesh of copies and shards, after two micro-batches a rank."""
    rank, model = dist.get_rank(), build()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    policy = MixedPrecisionPolicy()
    shard_model(model, units=[model[0]], mesh=mesh, policy=policy, reshard_after_forward=True)
    for micro_batch in range(2):
        set_gradient_sync(model, is_on=micro_batch == 1)
        model(inputs(rank, micro_batch)).square().sum().backward()
    kept = [p.to_local().shape == p.shape for p in model.parameters() if isinstance(p, DTensor)]
    gradients = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
    return total_norm(model.parameters()).item(), gradients, all(kept)


@pytest.mark.parametrize(("mesh_shape", "is_whole"), [((2, 1), True), ((2, 2), False)])
def test_copies_of_shards_sum_over_all_ranks_too(mesh_shape, is_whole, tmp_path):
    num_ranks = mesh_shape[0] * mesh_shape[1]
    model = reference(num_ranks)
    expected = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    for norm, gradients, kept in run_ranks(spread, num_ranks, mesh_shape, tmp_path=tmp_path):
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        assert kept is is_whole  # each rank of a mesh without shards holds the whole model
        for found, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad)


class Widening(nn.Module):
    """Hands float32 to its second layer, as some models do to theirs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.dtypes: list[torch.dtype] = []

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden.float())
            self.dtypes.append(hidden.dtype)
        return hidden


def cast(policy):
    model = Widening()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    shard_model(model, units=model.layers, mesh=mesh, policy=policy, reshard_after_forward=True)
    return model(torch.ones(2, 6)).dtype, model.dtypes


def cast_all():
    bf16 = torch.bfloat16
    outputs = [
        cast(MixedPrecisionPolicy(param_dtype=bf16, output_dtype=output))
        for output in (None, torch.float32)
    ]
    with pytest.raises(RuntimeError, match="dtype"):
        cast(MixedPrecisionPolicy(param_dtype=bf16, cast_forward_inputs=False))
    return outputs


def test_outputs_are_cast_at_the_root_and_inputs_at_every_unit(tmp_path):
    bf16 = torch.bfloat16
    for plain, widened in run_ranks(cast_all, 2, tmp_path=tmp_path):
        assert plain == (bf16, [bf16, bf16, bf16])
        assert widened == (torch.float32, [bf16, bf16, bf16])


def gather_ahead(forward_prefetch):
    """Whether the next layer's parameters are on their way while a layer computes."""
    model = Widening()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    shard_model(
        model,
        units=model.layers,
        mesh=mesh,
        policy=MixedPrecisionPolicy(),
        reshard_after_forward=True,
        forward_prefetch=forward_prefetch,
    )
    seen = []
    units = [layer for layer in model.layers if isinstance(layer, FSDPModule)]
    groups: list[Any] = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    for layer, following in zip(model.layers[:-1], groups[1:], strict=True):
        layer.register_forward_hook(
            lambda *_, group=following: seen.append(group._all_gather_result is not None)
        )
    total = model(torch.ones(2, 6)).sum()
    total.backward()
    return seen, total.item()


def gather_both_ways():
    torch.manual_seed(0)
    ahead = gather_ahead(True)
    torch.manual_seed(0)
    return ahead, gather_ahead(False)


def test_prefetching_gathers_the_next_layer_before_this_one_has_computed(tmp_path):
    for (ahead, one), (late, other) in run_ranks(gather_both_ways, 2, tmp_path=tmp_path):
        assert ahead == [True, True]
        assert late == [False, False]
        assert one == other


def keep_gathered(keeps_gathered):
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy()
    shard_model(model, units=[model[0]], mesh=mesh, policy=policy, reshard_after_forward=False)
    seen = []
    for micro_batch in range(3):
        set_gradient_sync(model, is_on=micro_batch == 2)
        set_resharding(model, is_on=not keeps_gathered or micro_batch == 2)
        model(inputs(dist.get_rank(), micro_batch)).square().sum().backward()
        seen.append(all(isinstance(p, DTensor) for p in model.parameters()))
    gradients = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
    return seen, gradients


def keep_both_ways():
    return keep_gathered(True), keep_gathered(False)


def test_parameters_can_stay_gathered_until_the_last_micro_batch(tmp_path):
    for (kept, ours), (freed, theirs) in run_ranks(keep_both_ways, 2, tmp_path=tmp_path):
        assert kept == [False, False, True]
        assert freed == [True, True, True]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def sync_each(offload):
    """What a rank holds of the gradients behind each micro-batch, with and without an option."""
    held, gradients = {}, {}
    for is_each in (True, False):
        model = build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        shard_model(
            model,
            units=[model[0]],
            mesh=mesh,
            policy=MixedPrecisionPolicy(),
            reshard_after_forward=True,
            offload=offload,
        )
        held[is_each] = []
        for micro_batch in range(2):
            set_gradient_sync(model, is_on=is_each or micro_batch == 1)
            model(inputs(dist.get_rank(), micro_batch)).square().sum().backward()
            held[is_each].append(gradient_sizes(model))
        full = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
        gradients[is_each] = full
    return held, gradients


def gradient_sizes(model):
    """Elements of the gradients that wait on this rank: its own part of sums, and whole ones."""
    parts = [p.grad.to_local().numel() for p in model.parameters() if isinstance(p.grad, DTensor)]
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    wholes = [
        grad.numel()
        for group in groups
        for parameter in group.fsdp_params
        if hasattr(parameter, "_unsharded_param")
        for grad in (parameter.unsharded_accumulated_grad, parameter._unsharded_param.grad)
        if grad is not None
    ]
    return sum(parts), sum(wholes)


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_reduced_each_time_never_stand_whole_on_a_rank(offload, tmp_path):
    sizes = [p.numel() for p in build().parameters()]
    plain = reference(2)
    for held, gradients in run_ranks(sync_each, 2, offload, tmp_path=tmp_path):
        part = sum(sizes) // 2
        assert held[True] == [(part, 0), (part, 0)]
        assert held[False] == [(0, sum(sizes)), (part, 0)]
        for found in gradients.values():
            for gradient, parameter in zip(found, plain.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad)


class UnsentError(Exception):
    """In place of a reduction that no backend here can do."""


def test_gradients_in_host_memory_are_summed_by_the_backend_of_the_device(monkeypatch):
    def refuse(tensor, group):
        raise UnsentError(f"{tensor.device.type} over {group}")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    mesh: Any = SimpleNamespace(device_type="meta", ndim=1, get_group=lambda dim: f"dim {dim}")
    with pytest.raises(UnsentError, match="meta over dim 0"):
        _sum_over(torch.ones(3), mesh)


def norms_of_groups():
    """Gradients that are sharded on one mesh, copied on another, and plain."""
    shape, names = (dist.get_world_size(),), ("axis",)
    one, other = (init_device_mesh("cpu", shape, mesh_dim_names=names) for _ in range(2))
    gradients = {
        "sharded": distribute_tensor(torch.full((4, 2), 3.0), one, [Shard(0)]),
        "copied": distribute_tensor(torch.full((4,), 2.0), other, [Replicate()]),
        "plain": torch.full((9,), 1.0),
    }
    parameters = {name: nn.Parameter(torch.zeros_like(g)) for name, g in gradients.items()}
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    sharded, copied, plain = parameters.values()
    idle = nn.Parameter(torch.zeros(3))
    groups = {"a": [sharded], "b": [copied, idle], "all": [sharded, copied, plain], "none": [idle]}
    return group_norms(groups), total_norm([sharded, copied, plain]).item()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_norms_of_groups_are_over_all_meshes_too(num_ranks, tmp_path):
    for norms, total in run_ranks(norms_of_groups, num_ranks, tmp_path=tmp_path):
        assert norms == pytest.approx({"a": 72**0.5, "b": 4.0, "all": 97**0.5, "none": 0.0})
        assert norms["all"] == total
