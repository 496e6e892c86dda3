"""Which numbers and names a field takes, each on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from omnilit.config.view import View
from omnilit.errors import Problem


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers; null is left to the field's type.

    Args:
        low: Smallest number.
        high: Largest number; None for no limit.
        open_low: Leave `low` itself out.
        open_high: Leave `high` itself out.
        also: One number outside that is legal too.
    """

    low: float
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether `value` is legal."""
        if value == self.also:
            return True
        above = value > self.low if self.open_low else value >= self.low
        if self.high is None or not above:
            return above
        return value < self.high if self.open_high else value <= self.high

    def __str__(self) -> str:
        """In words, e.g. `above 0 and at most 1`."""
        words = f"above {self.low}" if self.open_low else f"at least {self.low}"
        if self.high is not None:
            words += f" and {'below' if self.open_high else 'at most'} {self.high}"
        return words if self.also is None else f"{words}, or {self.also}"


COUNT: Final = Range(1)
NOT_NEGATIVE: Final = Range(0)
SHARE: Final = Range(0, 1)
POSITIVE: Final = Range(0, open_low=True)
SEED: Final = Range(0, 2**32 - 1)  # what numpy's generators take

RANGES: Final[Mapping[str, Range]] = {
    "data.train_size": COUNT,
    "data.max_seq_len": Range(2),  # a single token has no next one to predict
    "data.train_sample": COUNT,
    "data.max_bad_fraction": SHARE,
    "data.dyn_bsz_buffer_size": COUNT,
    "data.dataloader.num_workers": NOT_NEGATIVE,
    "data.dataloader.prefetch_factor": COUNT,
    "train.micro_batch_size": COUNT,
    "train.global_batch_size": COUNT,
    "train.num_train_epochs": COUNT,
    "train.bsz_warmup_ratio": SHARE,
    "train.bsz_warmup_init_mbtoken": COUNT,
    "train.max_steps": COUNT,
    "train.empty_cache_steps": NOT_NEGATIVE,
    "train.gc_steps": NOT_NEGATIVE,
    "train.log_layer_grad_norms_steps": NOT_NEGATIVE,
    "train.log_expert_load_steps": NOT_NEGATIVE,
    "train.profile.start_step": COUNT,
    "train.profile.end_step": COUNT,
    "train.eval_steps": NOT_NEGATIVE,
    "train.eval_epochs": NOT_NEGATIVE,
    "train.eval_samples": NOT_NEGATIVE,
    "train.eval_samples_max_tokens": COUNT,
    "train.seed": SEED,
    "train.optimizer.lr": NOT_NEGATIVE,
    "train.optimizer.lr_min": NOT_NEGATIVE,
    "train.optimizer.lr_start": NOT_NEGATIVE,
    "train.optimizer.lr_warmup_ratio": SHARE,
    "train.optimizer.lr_decay_ratio": SHARE,
    "train.optimizer.weight_decay": NOT_NEGATIVE,
    "train.optimizer.max_grad_norm": NOT_NEGATIVE,
    "train.optimizer.betas": Range(0, 1, open_high=True),
    "train.optimizer.eps": POSITIVE,
    "train.optimizer.max_skipped_steps": COUNT,
    "train.accelerator.dp_replicate_size": Range(1, also=-1),
    "train.accelerator.dp_shard_size": Range(1, also=-1),
    **{f"train.accelerator.{axis}_size": COUNT for axis in ("tp", "ep", "pp", "ulysses", "cp")},
    "train.accelerator.fsdp_config.max_load_broadcast_size": POSITIVE,
    "train.accelerator.offload_config.activation_gpu_limit": NOT_NEGATIVE,
    "train.accelerator.timeout_s": POSITIVE,
    "train.accelerator.pp_stages_per_rank": COUNT,
    "train.checkpoint.save_steps": NOT_NEGATIVE,
    "train.checkpoint.save_epochs": NOT_NEGATIVE,
    "train.checkpoint.hf_save_steps": NOT_NEGATIVE,
    "train.checkpoint.hf_save_epochs": NOT_NEGATIVE,
    "train.checkpoint.keep_last": COUNT,
    "dpo_config.beta": POSITIVE,
    "dpo_config.label_smoothing": Range(0, 0.5, open_high=True),
    "dpo_config.simpo_gamma": NOT_NEGATIVE,
    "infer.seed": SEED,
    "infer.temperature": NOT_NEGATIVE,
    "infer.top_p": Range(0, 1, open_low=True),
    "infer.max_tokens": COUNT,
}

DTYPES: Final = ("bfloat16", "float32")
EXPORT_DTYPES: Final = ("auto", *DTYPES, "float16")
MIXED: Final = "train.accelerator.fsdp_config.mixed_precision"
ALGORITHM: Final = "model.encoder_data_balance_sorting_algo"
NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    ALGORITHM: ("post_mbs_balancing_greedy_without_pad",),
    "data.dataloader.type": ("native",),
    "data.multisource_datasets_type": ("interleave", "veomni_weighted_multisource"),
    "train.optimizer.lr_decay_style": ("constant", "linear", "cosine"),
    "train.checkpoint.manager": ("dcp",),
    "train.checkpoint.export_dtype": EXPORT_DTYPES,
    f"{MIXED}.param_dtype": ("auto", *DTYPES),
    f"{MIXED}.reduce_dtype": DTYPES,
    f"{MIXED}.output_dtype": DTYPES,
    f"{MIXED}.master_dtype": DTYPES,
}


def check_range(view: View, path: str) -> list[Problem]:
    """A problem where the number, or one of the numbers, at `path` is outside its range."""
    value: Any = view[path]
    if value is None:
        return []
    numbers = value if isinstance(value, list | tuple) else (value,)
    if all(number in RANGES[path] for number in numbers):
        return []
    shown = list(numbers) if numbers is value else value
    each = "numbers" if numbers is value else "a number"
    return [Problem(path, f"{shown} is out of range", f"use {each} {RANGES[path]}")]


def check_name(view: View, path: str) -> list[Problem]:
    """A problem where the name at `path` is not one of the known ones."""
    return refuse_name(path, view[path])


def refuse_name(path: str, name: str | None) -> list[Problem]:
    """A problem where a name for the field at `path` is not one of the known ones."""
    if name is None or name in NAMES[path]:  # null is left to the field's type
        return []
    problem = f"{name!r} is not known"
    if path.startswith(MIXED) and name in {"float16", "fp16", "half"}:
        problem = f"{name!r} needs a loss scaler, and there is none"
    return [Problem(path, problem, f"use one of {', '.join(NAMES[path])}")]
