"""AdamW that keeps its two averages in bfloat16, and can keep what a bfloat16 weight rounds off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from typing_extensions import override

from omnilit.parallel.local import local_part

# Elements whose float32 copies exist at one time: 64 MiB each. All at once would take more
# memory than the averages save.
BUCKET: Final = 2**24
MEAN: Final = "exp_avg"
SQUARE: Final = "exp_avg_sq"
CARRY: Final = "compensation"
COUNT: Final = "step"


@dataclass(frozen=True, slots=True)
class _Part:
    """One parameter's tensors of a step, or pieces of them, all of this rank's own shard."""

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    carry: Tensor | None
    step: Tensor


class AnyPrecisionAdamW(Optimizer):
    """AdamW with decoupled weight decay, moments stored in `moment_dtype`, arithmetic in float32.

    A step widens moments, gradients and weights to float32, runs torch's own AdamW there, and
    rounds the results back. So with float32 moments it is torch's AdamW to the bit.

    Bfloat16 weights lose every update below 1/512 of their size. With Kahan summation each weight
    has a second bfloat16 number: what was rounded off, which the next step adds first. Together
    they hold 16 bits, and weight decay goes through both.

    Args:
        params: Parameters or groups, sharded (DTensor) or not.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        use_kahan_summation: Keep what rounding takes from a weight.
        moment_dtype: Of both moments, and of what Kahan summation keeps.
        fused: One kernel over all parameters; None lets torch choose.

    Source: torchdistx `AnyPrecisionAdamW`; Kahan, Communications of the ACM 8 (1965), 40.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_kahan_summation: bool = False,
        moment_dtype: torch.dtype = torch.bfloat16,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "use_kahan_summation": use_kahan_summation,
            "moment_dtype": moment_dtype,
            "fused": fused,
        }
        super().__init__(params, defaults)

    @override
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - torch overloads it by closure
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient; the others and their moments stay.

        Args:
            closure: Computes gradients and loss anew, and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parts = [self._part(p, group) for p in group["params"] if p.grad is not None]
            for bucket in _buckets([piece for part in parts for piece in _pieces(part)]):
                _update(bucket, group)
            for part in parts:
                part.step.add_(1)
        return loss

    def _part(self, parameter: Tensor, group: dict[str, Any]) -> _Part:
        state = self._ready_state(parameter, group)
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(parameter, DTensor):
            assert isinstance(gradient, DTensor)
            assert gradient.placements == parameter.placements, "a gradient lies as its parameter"
        return _Part(
            local_part(parameter),
            local_part(gradient),
            local_part(state[MEAN]),
            local_part(state[SQUARE]),
            local_part(state[CARRY]) if CARRY in state else None,
            state[COUNT],
        )

    def _ready_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter, in the form that the group asks for, made where it lacks."""
        state = cast("dict[str, Tensor]", self.state[parameter])
        dtype: torch.dtype = group["moment_dtype"]
        if COUNT not in state:
            device = parameter.device if group["fused"] else "cpu"
            state[COUNT] = torch.zeros((), dtype=torch.float32, device=device)
        names = [MEAN, SQUARE, CARRY] if group["use_kahan_summation"] else [MEAN, SQUARE]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            elif state[name].dtype != dtype:  # torch's load_state_dict casts to the parameter's
                state[name] = state[name].to(dtype)
        if not group["use_kahan_summation"]:
            state.pop(CARRY, None)  # of a run that had it
        return state


def _pieces(part: _Part) -> Iterator[_Part]:
    """Views of at most `BUCKET` elements; the part itself where memory is not in one piece."""
    kept = (part.weight, part.gradient, part.mean, part.square)
    tensors = kept if part.carry is None else (*kept, part.carry)
    if part.weight.numel() <= BUCKET or not all(tensor.is_contiguous() for tensor in tensors):
        yield part
        return
    for weight, gradient, mean, square, *carry in zip(
        *(tensor.view(-1).split(BUCKET) for tensor in tensors), strict=True
    ):
        yield _Part(weight, gradient, mean, square, carry[0] if carry else None, part.step)


def _buckets(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Consecutive parts of at most `BUCKET` elements, or of a single larger one."""
    bucket: list[_Part] = []
    size = 0
    for part in parts:
        if bucket and size + part.weight.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(part)
        size += part.weight.numel()
    if bucket:
        yield bucket


def _update(parts: list[_Part], group: dict[str, Any]) -> None:
    """One AdamW step in float32, in place where a tensor is float32 already; counts stay."""
    weights = [_wide_weight(part) for part in parts]
    means = [part.mean.float() for part in parts]
    squares = [part.square.float() for part in parts]
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        [part.gradient.float() for part in parts],
        means,
        squares,
        [],
        [part.step.clone() for part in parts],  # counted once a parameter, not once a piece
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for part, weight, mean, square in zip(parts, weights, means, squares, strict=True):
        _store(part.mean, mean)
        _store(part.square, square)
        _store(part.weight, weight)
        if part.carry is not None:
            part.carry.copy_(weight - part.weight.float())


def _wide_weight(part: _Part) -> Tensor:
    """A weight in float32, with what its last rounding took; itself where nothing did."""
    if part.carry is None:
        return part.weight.float()
    return part.weight.float() + part.carry.float()


def _store(kept: Tensor, value: Tensor) -> None:
    if value is not kept:  # float() gives a float32 tensor itself
        kept.copy_(value)
