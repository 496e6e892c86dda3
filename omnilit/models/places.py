"""Where in a model of transformers each kernel slot has a place, measured rather than named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from omnilit.kernels import linear_attention, rms_norm, rope, swiglu

ROTARY_NAME: Final = "apply_rotary_pos_emb"
_GLU_NAMES: Final = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


def is_experts(module: nn.Module) -> bool:
    """True for the stacked experts that transformers runs through its experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def is_swiglu(module: nn.Module) -> bool:
    """True for an MLP that computes down(silu(gate(x)) * up(x)) and nothing else."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or set(code.co_names) != _GLU_NAMES or list(module.parameters(recurse=False)):
        return False
    probe = torch.linspace(-2, 2, 9, device="cpu")
    activation = cast("Callable[[Tensor], Tensor]", module.act_fn)
    return torch.allclose(activation(probe) * probe, swiglu.eager(probe, probe))


def uses_rotary(module: nn.Module) -> bool:
    """True for attention that rotates halves of heads by the module's `apply_rotary_pos_emb`.

    A second rotary function in the same forward means that the configuration chooses between
    them, so it is left alone.
    """
    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    used = [name for name in names if name.startswith("apply_rotary")]
    return used == [ROTARY_NAME] and _rotates_halves(forward.__globals__[ROTARY_NAME])


def measure_rms_offset(module: nn.Module) -> float | None:
    """0.0 where an RMSNorm multiplies by w (Llama), 1.0 by 1 + w (Gemma), None for other modules.

    The class's own forward is run on a probe, on the CPU, with the module's settings.
    """
    parameters = dict(module.named_parameters(recurse=False))
    looks = type(module).__name__.endswith("RMSNorm") and list(parameters) == ["weight"]
    if not looks or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    weight, x = _probe_of(parameters["weight"].shape[0])
    with torch.no_grad():
        out = type(module).forward(_twin(module, weight), x)
        for offset in (0.0, 1.0):
            expected = rms_norm.eager(x, weight, eps=rms_eps(module), offset=offset)
            if torch.allclose(out, expected, rtol=1e-5, atol=1e-6):
                return offset
    return None


def is_gated_rms_norm(module: nn.Module) -> bool:
    """True for an RMSNorm that multiplies by w, and then by the SiLU of a gate."""
    parameters = dict(module.named_parameters(recurse=False))
    looks = type(module).__name__.endswith("RMSNormGated") and list(parameters) == ["weight"]
    if not looks or len(inspect.signature(type(module).forward).parameters) != 3:
        return False
    weight, x = _probe_of(parameters["weight"].shape[0])
    with torch.no_grad():
        out = type(module).forward(_twin(module, weight), x, x.flip(-1))
    expected = linear_attention.rms_norm_gated(x, x.flip(-1), weight, eps=rms_eps(module))
    return torch.allclose(out, expected, rtol=1e-5, atol=1e-6)


def _probe_of(width: int) -> tuple[Tensor, Tensor]:
    """Weight and input that tell one norm from another."""
    x = torch.linspace(-1, 2, width, device="cpu")[None]
    return torch.linspace(0.5, 1.5, width, device="cpu"), x


def _twin(module: nn.Module, weight: Tensor) -> nn.Module:
    """Another module of the same class and settings, with a weight of its own on the CPU."""
    twin = object.__new__(type(module))
    nn.Module.__init__(twin)
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    vars(twin).update({key: value for key, value in settings.items() if key != "forward"})
    twin.weight = nn.Parameter(weight)
    return twin


def rms_eps(module: nn.Module) -> float:
    """What an RMSNorm adds to the mean square; families name it in two ways."""
    eps: Any = getattr(module, "variance_epsilon", None)
    return float(getattr(module, "eps", 0.0) or 0.0) if eps is None else float(eps)


def _rotates_halves(function: Callable[..., Any]) -> bool:
    """Whether it does so to whole heads and, if to a part of each, to the first one."""
    shape = (1, 1, 3, 4)
    q = torch.linspace(-1, 1, 12, device="cpu").reshape(shape)
    angles = torch.linspace(0, 1, 6, device="cpu").reshape(1, 3, 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        turned, _ = function(q, q, cos, sin)
    except (RuntimeError, TypeError):  # another layout of cosines, or another signature
        return False
    if not torch.allclose(turned, rope.eager(q, q, cos, sin)[0]):
        return False
    cos, sin = cos[..., ::2], sin[..., ::2]
    try:
        turned, _ = function(q, q, cos, sin)
    except RuntimeError:  # it knows whole heads only
        return True
    part = rope.eager(q[..., :2], q[..., :2], cos, sin)[0]
    return torch.allclose(turned, torch.cat((part, q[..., 2:]), -1))


def has_balance_loss(model: nn.Module) -> bool:
    """Whether the model's own forward adds up the router's balance loss."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    return bool(getattr(text, "output_router_logits", False))
