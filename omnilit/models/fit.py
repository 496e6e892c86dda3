"""Whether a model can be divided as the parallel sizes ask: numbers against numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedConfig

from omnilit.config.parallel_sizes import ACCELERATOR, ParallelSizes, describe
from omnilit.errors import ConfigError, Problem
from omnilit.models.class_labels import is_classifier
from omnilit.models.families.tensor_plans import plan_of, why_unsplit

# Configurations name the same thing differently; layers of one model may differ in it too
HEADS: Final = ("num_attention_heads", "swa_num_attention_heads")
KV_HEADS: Final = ("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
DELTA_HEADS: Final = ("linear_num_value_heads",)
ATTENTION: Final = re.compile(r"att(entio)?n\b")
BY_HEADS: Final = "colwise"  # others split a projection and gather its output
EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """What parallel axes divide of a model.

    Args:
        model_type: As transformers names it.
        layers: Decoder blocks.
        heads: Attention heads: one number, or several where layers differ.
        kv_heads: Those of keys and values, likewise.
        delta_heads: Those of the values in linear attention, likewise; empty without it.
        experts: Of one layer; 0 for a dense model.
        hidden: Width of the residual stream.
        vocab: Rows of the embedding.
        is_tied: Head and embedding are one matrix.
        has_tp_plan: It is known how its matrices are split.
        is_attention_split: That plan splits attention by heads too; some split experts alone.
        has_ep_plan: transformers says how its experts are split.
        why_unsplit: Why its matrices cannot be split in spite of a plan; empty where they can.
    """

    model_type: str
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    delta_heads: tuple[int, ...]
    experts: int
    hidden: int
    vocab: int
    is_tied: bool
    has_tp_plan: bool
    is_attention_split: bool
    has_ep_plan: bool
    why_unsplit: str = ""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelNumbers:
        """The numbers of a model's decoder, be it the whole model or a part of it."""
        text = config.get_text_config(decoder=True)
        heads, experts = _numbers(text, HEADS), _numbers(text, EXPERTS)
        split = {**plan_of(text), **(text.base_model_tp_plan or {})}
        return cls(
            model_type=text.model_type,
            layers=getattr(text, "num_hidden_layers", 0),
            heads=heads,
            kv_heads=_numbers(text, KV_HEADS) or heads,
            delta_heads=_numbers(text, DELTA_HEADS),
            experts=max(experts, default=0),
            hidden=getattr(text, "hidden_size", 0),
            vocab=getattr(text, "vocab_size", 0),
            is_tied=_has_tie(config),
            has_tp_plan=bool(split),
            is_attention_split=any(
                ATTENTION.search(name) and style == BY_HEADS for name, style in split.items()
            ),
            has_ep_plan=bool(text.base_model_ep_plan),
            why_unsplit=why_unsplit(config),
        )


def _has_tie(config: PreTrainedConfig) -> bool:
    """Whether head and embedding are one matrix; a classifier's head is its own."""
    return bool(getattr(config, "tie_word_embeddings", False)) and not is_classifier(config)


def _numbers(config: PreTrainedConfig, names: Iterable[str]) -> tuple[int, ...]:
    """The different numbers under `names`, each one number or one a layer."""
    layers = config.per_layer_config if config.is_heterogeneous else [config]
    found: set[int] = set()
    for layer in layers:
        for name in names:
            value: int | Iterable[int] | None = getattr(layer, name, None)
            found.update([value or 0] if isinstance(value, int | None) else value)
    return tuple(sorted(found - {0}))


def check_fit(config: PreTrainedConfig, sizes: ParallelSizes, *, stages_per_rank: int = 1) -> None:
    """Refuse a model that the sizes cannot divide.

    Raises:
        ConfigError: With all problems.
    """
    numbers = ModelNumbers.of(config)
    if problems := fit_problems(sizes, numbers, stages_per_rank=stages_per_rank):
        raise ConfigError.of(problems)


def divides_model(sizes: ParallelSizes) -> bool:
    """Whether the sizes ask anything of a model's numbers at all."""
    return max(sizes.tp_size, sizes.sequence_size, sizes.ep_size, sizes.pp_size) > 1


def fit_problems(
    sizes: ParallelSizes, numbers: ModelNumbers, *, stages_per_rank: int = 1
) -> list[Problem]:
    """Why a model cannot be divided so; nothing where it can.

    Args:
        sizes: Resolved or not: the data sizes do not matter.
        numbers: Of the model.
        stages_per_rank: Of a pipeline.
    """
    return [
        *_matrices(sizes, numbers),
        *_heads(sizes, numbers),
        *_delta_heads(sizes, numbers),
        *_experts(sizes, numbers),
        *_stages(sizes.pp_size, sizes.pp_size * stages_per_rank, numbers),
    ]


def _matrices(sizes: ParallelSizes, numbers: ModelNumbers) -> list[Problem]:
    size, key = sizes.tp_size, f"{ACCELERATOR}.tp_size"
    if size == 1:
        return []
    if not numbers.has_tp_plan:
        problem = f"there is no plan for splitting the matrices of {numbers.model_type} (tp_plan)"
        return [Problem(key, problem, "leave tp_size out")]
    if numbers.why_unsplit:
        problem = f"the matrices of {numbers.model_type} cannot be split: {numbers.why_unsplit}"
        return [Problem(key, problem, "leave tp_size out")]
    heads = [("attention heads", numbers.heads), ("key-value heads", numbers.kv_heads)]
    found = [
        Problem(key, _undivided(f"tp_size {size}", count, what, numbers), _divisor_of(count))
        for what, counts in (heads if numbers.is_attention_split else [])
        for count in counts
        if count % size
    ]
    if numbers.vocab % size:
        problem = _undivided(f"tp_size {size}", numbers.vocab, "tokens of the vocabulary", numbers)
        found.append(Problem(key, problem, _divisor_of(numbers.vocab)))
    return found[:1]  # heads and key-value heads are often the same


def _heads(sizes: ParallelSizes, numbers: ModelNumbers) -> list[Problem]:
    """Ulysses trades what tensor parallelism leaves a rank of the heads."""
    if sizes.ulysses_size == 1:
        return []
    parts = [("ulysses_size", sizes.ulysses_size)]
    tp_size = sizes.tp_size if numbers.is_attention_split else 1
    if tp_size > 1:
        parts.append(("tp_size", tp_size))
    return [
        Problem(
            f"{ACCELERATOR}.ulysses_size",
            _undivided(describe(parts), count, "attention heads", numbers),
            _divisor_of(count, [name for name, _ in parts]),
        )
        for count in numbers.heads
        if count % tp_size == 0 and count % (sizes.ulysses_size * tp_size)
    ][:1]


def _delta_heads(sizes: ParallelSizes, numbers: ModelNumbers) -> list[Problem]:
    """Linear attention trades heads for tokens with all ranks that share a row."""
    split = [("ulysses_size", sizes.ulysses_size), ("cp_size", sizes.cp_size)]
    parts = [(name, size) for name, size in split if size > 1]
    names = [name for name, _ in parts]
    return [
        Problem(
            f"{ACCELERATOR}.{names[0]}",
            _undivided(describe(parts), count, "value heads of linear attention", numbers),
            _divisor_of(count, names),
        )
        for count in numbers.delta_heads
        if count % sizes.sequence_size
    ]


def _experts(sizes: ParallelSizes, numbers: ModelNumbers) -> list[Problem]:
    size, key, count = sizes.ep_size, f"{ACCELERATOR}.ep_size", numbers.experts
    if size == 1:
        return []
    if not count:
        problem = f"{numbers.model_type} has no experts to split"
        return [Problem(key, problem, "leave ep_size out, or train a mixture of experts")]
    if not numbers.has_ep_plan:
        problem = f"transformers does not say how the experts of {numbers.model_type} are split"
        return [Problem(key, problem, "leave ep_size out")]
    if count % size:
        return [
            Problem(
                key, _undivided(f"ep_size {size}", count, "experts", numbers), _divisor_of(count)
            )
        ]
    return []


def _stages(size: int, num_stages: int, numbers: ModelNumbers) -> list[Problem]:
    key = f"{ACCELERATOR}.pp_size"
    if size == 1:
        return []
    if num_stages > numbers.layers:
        each = num_stages // size
        stages = f"{num_stages} stages" + (f", {each} on each of {size} ranks," if each > 1 else "")
        problem = f"{stages} are more than the {numbers.layers} layers of {numbers.model_type}"
        return [Problem(key, problem, f"use at most {numbers.layers // each}")]
    if numbers.is_tied:
        problem = (
            f"head and embedding of {numbers.model_type} are one matrix (tie_word_embeddings), "
            "which its first and its last stage would both train"
        )
        fix = "leave pp_size out, or train a model whose configuration does not tie them"
        return [Problem(key, problem, fix)]
    return []


def _undivided(sizes: str, count: int, what: str, numbers: ModelNumbers) -> str:
    return f"{sizes} does not divide the {count} {what} of {numbers.model_type}"


def _divisor_of(count: int, names: Sequence[str] = ()) -> str:
    divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    if len(names) > 1:
        return f"choose {' * '.join(names)} among {divisors}"
    return f"use a divisor: {divisors}"
