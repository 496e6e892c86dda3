"""`train.optimizer`: the update rule and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its parameter groups and its schedule.

    Args:
        type: adamw, or anyprecision_adamw, which keeps its moments in bfloat16.
        lr: Highest learning rate.
        lr_min: Learning rate at the end of the decay.
        lr_start: Learning rate at the first step of the warm-up.
        lr_warmup_ratio: Share of all steps in which the rate rises from `lr_start` to `lr`.
        lr_decay_style: constant, linear or cosine.
        lr_decay_ratio: Share of all steps, warm-up included, after which `lr_min` is reached.
        weight_decay: Decoupled weight decay.
        no_decay_modules: Class names of modules whose parameters are not decayed, e.g. RMSNorm.
        no_decay_params: Parameters whose name contains one of these, in lower or upper case, are
            not decayed, e.g. bias.
        max_grad_norm: Gradients are scaled down to this joint norm; 0 for no clipping.
        betas: Decay rates of AdamW's two moments.
        eps: Added to the root of the second moment.
        max_skipped_steps: Steps in a row skipped for a gradient that is not finite, after which
            the run stops.
        use_kahan_summation: Keep what rounding takes from a bfloat16 weight for the next step;
            with anyprecision_adamw.
    """

    type: Literal["adamw", "anyprecision_adamw"] = "adamw"
    lr: float = 5e-5
    lr_min: float = 1e-7
    lr_start: float = 0.0
    lr_warmup_ratio: float = 0.0
    lr_decay_style: str = "constant"
    lr_decay_ratio: float = 1.0
    weight_decay: float = 0.0
    no_decay_modules: list[str] = field(default_factory=list)
    no_decay_params: list[str] = field(default_factory=list)
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_skipped_steps: int = 10
    use_kahan_summation: bool = False
