"""Backends of the slot `moe` against the loops that transformers' own modules have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from omnilit.errors import KernelError
from omnilit.kernels.moe import eager
from omnilit.kernels.moe_by_expert import by_expert, is_swiglu, multiply
from omnilit.kernels.moe_grouped import grouped_mm, run_grouped
from omnilit.kernels.projections import Projections
from omnilit.kernels.routes import Routes

E, D, K = 5, 16, 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 8),
    **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
    "moe_latent_size": None,
    "post_norm_eps": 1e-6,
    "swiglu_alpha": 1.7,
    "swiglu_limit": 1.0,  # reached
    "_experts_implementation": "eager",
}
MODULES = {
    "gate": Qwen3MoeExperts,
    "transposed": AriaExperts,
    "clamped gate": DeepseekV4Experts,
    "biases, interleaved gate": GptOssExperts,
    "no gate": NemotronHExperts,
    "norm behind": MuseSparkExperts,
}


def grouped_by_expert(experts: Any, *routed: Tensor) -> Tensor:
    return run_grouped(Projections.of(experts), *routed, multiply=multiply)


KERNELS = {"torch": by_expert, "grouped_mm": grouped_mm, "own product": grouped_by_expert}


def make(cls: Any, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    experts = cls(SimpleNamespace(**SIZES | sizes))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype)


def route(num_tokens: int, num_experts: int = E - 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, distinct experts of each, of which the last gets none, and weights."""
    order = torch.rand(num_tokens, num_experts).argsort(-1)
    return torch.randn(num_tokens, D), order[:, :K], torch.rand(num_tokens, K)


def run(kernel: Any, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
    """The outcome and the gradients of tokens, weights and parameters."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weights)]
    out = kernel(experts, leaves[0], index, leaves[1])
    along = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, (*leaves, *experts.parameters()), along)]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("cls", MODULES.values(), ids=MODULES.keys())
def test_experts_equal_the_loop_of_their_module(cls, num_tokens, kernel):
    experts = make(cls)
    routed = route(num_tokens)
    expected = run(cls.forward, experts, *routed)
    for ours, theirs in zip(run(kernel, experts, *routed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [10.0, 1e4])
def test_gates_clamped_far_from_zero_have_their_own_gradients(limit):
    experts = make(DeepseekV4Experts, swiglu_limit=limit)
    assert not is_swiglu(Projections.of(experts).between)
    hidden, *routed = route(37)
    routed = (hidden * limit, *routed)  # beyond it on all sides
    expected = run(DeepseekV4Experts.forward, experts, *routed)
    for ours, theirs in zip(run(by_expert, experts, *routed), expected, strict=True):
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_bfloat16_is_as_near_to_float32_as_the_loop(kernel):
    experts = make(Qwen3MoeExperts, torch.bfloat16)
    hidden, index, weights = route(123)
    narrow = (hidden.bfloat16(), index, weights)  # a router's weights may stay float32
    exact = run(eager, make_wide(experts), narrow[0].float(), index, weights)
    for found, wide in zip(run(kernel, experts, *narrow), exact, strict=True):
        error = (found.float() - wide).norm() / wide.norm()
        assert error < 4 / 256  # a few roundings to 8 bits


def make_wide(experts: Any) -> Any:
    wide = make(type(experts))
    wide.load_state_dict({name: p.float() for name, p in experts.state_dict().items()})
    return wide


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("cls", [Qwen3MoeExperts, MuseSparkExperts])
def test_ids_past_the_last_expert_are_skipped(cls, kernel):
    experts = make(cls)
    hidden, index, weights = route(37, num_experts=E + 1)
    assert (index == E).any()
    expected = run(cls.forward, experts, hidden, index, weights)
    for ours, theirs in zip(run(kernel, experts, hidden, index, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    nowhere = run(kernel, experts, hidden, torch.full_like(index, E), weights)
    assert not any(found.any() for found in nowhere)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_an_activation_with_parameters_trains_them(kernel):
    experts = make(Qwen3MoeExperts)
    experts.act_fn = torch.nn.PReLU()
    routed = route(9)
    expected = run(Qwen3MoeExperts.forward, experts, *routed)
    for ours, theirs in zip(run(kernel, experts, *routed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_no_token_at_all_gives_none_and_no_gradient(kernel):
    out, *gradients = run(kernel, make(Qwen3MoeExperts), *route(0))
    assert out.shape == (0, D)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_parameters_that_are_not_trained_get_no_gradient(kernel):
    experts = make(Qwen3MoeExperts)
    experts.requires_grad_(False)
    hidden, index, weights = route(9)
    hidden.requires_grad_()
    (ours,) = torch.autograd.grad(kernel(experts, hidden, index, weights).sum(), hidden)
    (theirs,) = torch.autograd.grad(experts(hidden, index, weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs)


def test_sizes_that_torchs_product_does_not_take_are_refused():
    experts = make(Qwen3MoeExperts, torch.bfloat16)
    experts.down_proj = torch.nn.Parameter(torch.zeros(E, D, 6, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="rows of whole 16 bytes, and experts of 6 by 16 in"):
        grouped_mm(experts, *route(3))


def test_experts_check_out_by_finite_differences():
    experts = make(GptOssExperts, torch.float64)
    hidden, index, weights = (x.double() if x.is_floating_point() else x for x in route(3))
    inputs = [x.requires_grad_() for x in (hidden, weights)]
    torch.autograd.gradcheck(lambda x, w: by_expert(experts, x, index, w), inputs)


def test_the_usual_gate_is_told_from_others():
    usual = {name for name, cls in MODULES.items() if is_swiglu(Projections.of(make(cls)).between)}
    assert usual == {"gate", "transposed", "norm behind"}


def test_rows_are_sorted_by_expert_and_find_back():
    index = torch.tensor([[2, 0], [0, 1], [3, 2]])
    routes = Routes.sort(index, num_experts=3)
    assert routes.token.tolist() == [0, 1, 1, 0, 2, 2]
    assert routes.ends.tolist() == [2, 3, 5]  # expert 3 is past the last one
    x = torch.tensor([[1.0], [10.0], [100.0]])
    assert routes.add_up(routes.gather(x)).flatten().tolist() == [2.0, 20.0, 200.0]


def test_gathering_and_adding_up_are_transposes():
    routes = Routes.sort(torch.tensor([[1, 0], [0, 1], [1, 0]]), num_experts=2)
    x, rows = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    (grad_x,) = torch.autograd.grad(routes.gather(x), x, rows.detach())
    torch.testing.assert_close(grad_x, routes.add_up(rows.detach()))
    (grad_rows,) = torch.autograd.grad(routes.add_up(rows), rows, x.detach())
    torch.testing.assert_close(grad_rows, routes.gather(x.detach()))
