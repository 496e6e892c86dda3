"""What a step of training costs in floating-point operations, counted from the configuration.

The model that the configuration describes is walked, on the meta device, before anything is bound
or sharded: so a family needs no formula here. Matrix products count, a multiplication and an
addition as two; norms, activations, rotary angles and lookups are left out. Backward costs twice
the forward; what recomputation repeats is no progress and does not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Final

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from omnilit.models.attention import is_attention
from omnilit.models.blocks import decoder_blocks
from omnilit.models.delta_form import is_delta_net
from omnilit.models.heads import output_head
from omnilit.models.lora import AdapterPlan
from omnilit.types import TOKENS, MicroBatch

TRAINING: Final = 3  # a forward, and a backward of twice its cost


class UnknownCostError(Exception):
    """A layer of which nothing here says what it costs."""


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Layers of attention that see equally far.

    Args:
        per_pair: Operations of the forward for a query and a key that it sees, in all of them.
        window: Keys that a query sees at most; None for all before it.
    """

    per_pair: int
    window: int | None


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a causal language model costs in the forward.

    Args:
        per_token: Of the matrices that every token passes: of the experts those it is sent to.
        per_target: Of the head, which sees supervised tokens alone.
        attention: Of its layers.
        frozen_per_token: Share of `per_token` of matrices that get no gradient of their own.
        frozen_per_target: The same of `per_target`.
    """

    per_token: int
    per_target: int
    attention: tuple[AttentionCost, ...]
    frozen_per_token: int = 0
    frozen_per_target: int = 0

    def of_step(self, lengths: Sequence[int], num_targets: int) -> float:
        """Operations of training on packed sequences, forward and backward.

        Args:
            lengths: Of the sequences, padding left out.
            num_targets: Supervised tokens.
        """
        pairs = sum(
            layer.per_pair * causal_pairs(length, layer.window)
            for layer in self.attention
            for length in lengths
        )
        tokens = sum(lengths)
        spared = self.frozen_per_token * tokens + self.frozen_per_target * num_targets
        return TRAINING * (self.per_token * tokens + self.per_target * num_targets + pairs) - spared

    def forward_of_batch(self, batch: MicroBatch) -> float:
        """Operations of a forward pass that no backward pass follows."""
        trained = replace(self, frozen_per_token=0, frozen_per_target=0)
        return trained.of_batch(batch) / TRAINING

    def of_batch(self, batch: MicroBatch) -> float:
        """`of_step` of a micro-batch; one that only fills a window costs nothing.

        Of a row that several ranks share, each counts an even share and its own targets.
        """
        lengths = [end - start for start, end in pairwise(batch.bounds)]
        if batch.num_padding:
            lengths.pop()
        of_row = self.of_step(lengths if batch.origins else (), 0)
        return of_row / batch.num_parts + self.of_step((), round(batch.counts.get(TOKENS, 0)))


def causal_pairs(length: int, window: int | None = None) -> float:
    """Pairs of a query and a key that it sees: half of the square, less what a window hides."""
    seen = min(length, window or length)
    return seen * length - seen * seen / 2


def count_flops(model: PreTrainedModel) -> ModelFlops | None:
    """The cost of a model's language part.

    Args:
        model: As transformers built it, whole; the meta device will do.

    Returns:
        None where a layer is of a kind that is not known here: better no number than a wrong one.
    """
    head, decoder = output_head(model), model.get_decoder()
    blocks = decoder_blocks(decoder)
    if not isinstance(head, nn.Linear) or not blocks or not all(map(_has_attention, blocks)):
        return None
    try:
        per_token = sum(matrix_cost(m, decoder.config) for m in decoder.modules() if m is not head)
        costs = [attention_cost(m, decoder.config) for m in decoder.modules() if is_attention(m)]
    except UnknownCostError:
        return None
    by_window: Counter[int | None] = Counter()
    for cost in costs:
        by_window[cost.window] += cost.per_pair
    attention = tuple(AttentionCost(per_pair, window) for window, per_pair in by_window.items())
    return ModelFlops(per_token, 2 * head.weight.numel(), attention)


def count_adapter_flops(flops: ModelFlops, model: PreTrainedModel, plan: AdapterPlan) -> ModelFlops:
    """The cost of training adapters beside a frozen model: the factors, and no gradient but theirs.

    Factors beside stacked experts count as if each token met those of its own experts.

    Args:
        flops: Of the model trained whole.
        model: With nothing split.
        plan: What is adapted, and what is trained whole.
    """
    head, decoder = output_head(model), model.get_decoder()
    whole = {model.get_submodule(name.rpartition(".")[0]) for name in plan.trained}
    trained = sum(matrix_cost(module, decoder.config) for module in whole if module is not head)
    num_chosen = getattr(decoder.config, "num_experts_per_tok", None) or 1
    factors = sum(
        2
        * adapter.rank
        * (adapter.num_inputs + adapter.num_outputs)
        * (num_chosen if adapter.num_experts else 1)
        for adapter in plan.adapters
    )
    return replace(
        flops,
        per_token=flops.per_token + factors,
        frozen_per_token=flops.per_token - trained,
        frozen_per_target=0 if head in whole else flops.per_target,
    )


def _has_attention(block: nn.Module) -> bool:
    return any(is_attention(module) or is_delta_net(module) for module in block.modules())


def matrix_cost(module: nn.Module, config: PreTrainedConfig) -> int:
    """Operations of a module's own matrices for one token.

    Raises:
        UnknownCostError: It has parameters of which nothing here says how they are used.
    """
    if isinstance(module, nn.Embedding):
        return 0
    if is_delta_net(module):
        return _of_delta_rule(module)
    return sum(2 * size for size in _matrix_sizes(module, config))


def _of_delta_rule(module: nn.Module) -> int:
    """What the rule does to its state for a token, whatever form a kernel gives it.

    The state is read at the key and at the query, and a product of key and value written to it.
    """
    sizes = [getattr(module, name, None) for name in ("num_v_heads", "head_k_dim", "head_v_dim")]
    if not all(isinstance(size, int) for size in sizes):
        raise UnknownCostError
    return 3 * 2 * prod(size for size in sizes if isinstance(size, int))


def _matrix_sizes(module: nn.Module, config: PreTrainedConfig) -> Iterator[int]:
    """Elements that one token meets of each matrix; of stacked experts, of those it is sent to."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2 or name.endswith("bias"):
            continue
        if parameter.ndim == 2 or isinstance(module, nn.Conv1d):  # of one channel each
            yield parameter.numel()
            continue
        num_chosen = getattr(config, "num_experts_per_tok", None)
        if parameter.ndim != 3 or num_chosen is None:
            raise UnknownCostError
        yield parameter[0].numel() * num_chosen


def attention_cost(module: nn.Module, config: PreTrainedConfig) -> AttentionCost:
    """What a layer's attention costs.

    Raises:
        UnknownCostError: It does not say what its heads are.
    """
    heads = getattr(module, "num_heads", None) or _common(config, "num_attention_heads")
    plain = getattr(module, "head_dim", None)
    scored, mixed = getattr(module, "qk_head_dim", plain), getattr(module, "v_head_dim", plain)
    if heads is None or scored is None or mixed is None:
        raise UnknownCostError
    window = getattr(module, "sliding_window", _common(config, "sliding_window"))
    return AttentionCost(2 * heads * (scored + mixed), window)


def _common(config: PreTrainedConfig, name: str) -> int | None:
    """A number of all layers; None where they differ, since the configuration then raises."""
    return None if config.is_heterogeneous else getattr(config, name, None)
