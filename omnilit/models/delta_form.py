"""Which modules of transformers are gated delta nets whose parts our kernels can stand in for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from omnilit.kernels import linear_attention as reference
from omnilit.models.namespaces import own_forward

CONVOLVE: Final = "causal_conv1d_fn"  # what their code calls, of its own module
APPLY_RULE: Final = "torch_chunk_gated_delta_rule"
_PROBE: Final = 5  # tokens


def is_delta_net(module: nn.Module) -> bool:
    """Whether a module convolves and applies the gated delta rule, as Qwen3-Next first did."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and {CONVOLVE, APPLY_RULE} <= set(code.co_names)


def unbindable_reason(module: nn.Module) -> str | None:
    """Why the kernels cannot stand in for what a `is_delta_net` module calls; None where they can.

    Its functions are run on a probe, on the CPU.
    """
    name = type(module).__name__
    space = own_forward(module).__globals__
    activation = getattr(module, "activation", None)
    if activation not in ("silu", "swish"):
        return f"{name} convolves with the activation {activation!r}, and the kernels with silu"
    with torch.device("cpu"), torch.no_grad():
        if not _convolves(inspect.unwrap(space[CONVOLVE])):
            return f"{name} convolves in a way that the kernels do not know"
        if not _applies_rule(inspect.unwrap(space[APPLY_RULE])):
            return f"{name} has a delta rule that the kernels do not know"
    return None


def _convolves(function: Callable[..., Any]) -> bool:
    x, weight = torch.linspace(-1, 2, 2 * _PROBE).view(1, 2, _PROBE), torch.linspace(-1, 1, 6)
    own = function(x, weight.view(2, 3), None, activation=None)
    ours = reference.causal_conv1d(x[0].t(), weight.view(2, 3), None, bounds=(0, _PROBE))
    return own.shape == x.shape and torch.allclose(silu(own[0].t()), ours, atol=1e-6)


def _applies_rule(function: Callable[..., Any]) -> bool:
    def values(*shape: int) -> Tensor:
        return torch.linspace(-1, 2, torch.Size(shape).numel()).sin().view(shape)

    q, k, v = values(_PROBE, 1, 3), values(_PROBE, 1, 3).cos(), values(_PROBE, 2, 2)
    decay, beta = -values(_PROBE, 2).abs(), values(_PROBE, 2).abs()
    ours = reference.chunk_gated_delta_rule(q, k, v, decay, beta, bounds=(0, _PROBE))
    own, _ = function(
        q[None], k[None], v[None], g=decay[None], beta=beta[None], use_qk_l2norm_in_kernel=True
    )
    return own.shape == ours[None].shape and torch.allclose(own[0], ours, atol=1e-5)
