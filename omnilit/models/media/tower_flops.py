"""What a tower that sees or hears costs, counted like the language model in `flops`.

Its modules are walked from pixels or sounds on, so that each knows whether anything before it is
trained. A matrix costs its forward, and as much again for a gradient of its weight and for one of
its input, where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import mul
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from omnilit.models.attention import is_attention
from omnilit.models.blocks import decoder_blocks
from omnilit.models.flops import TRAINING, UnknownCostError, attention_cost, matrix_cost


class TowerLoad(NamedTuple):
    """What a tower has before it, in what its parts work on.

    Args:
        embedding: Operations of the convolutions.
        tokens: That pass its blocks.
        pairs: Of tokens that see each other in a block which sees all.
        near_pairs: The same in a block which sees windows.
        places: Features that come of it.
    """

    embedding: int
    tokens: int
    pairs: int
    near_pairs: int
    places: int


@dataclass(frozen=True, slots=True)
class Convolution:
    """One on the way into a tower.

    Args:
        per_position: Operations for a position of its kernel.
        kernel: Its size.
        stride: Between positions.
        padding: On each side.
    """

    per_position: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Those of its kernel on something of that shape, whose first sizes it may leave out."""
        sizes = zip(shape[-len(self.kernel) :], self.kernel, self.stride, self.padding, strict=True)
        return tuple((size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes)


@dataclass(frozen=True, slots=True)
class TowerFlops:
    """What training costs of a tower and of what lies behind it, forward and backward.

    Args:
        convolutions: In order, before the blocks.
        per_token: Of the blocks' matrices.
        per_pair: Of attention that sees all, for two tokens that see each other.
        per_near_pair: Of attention that sees windows.
        per_place: Of the matrices behind the blocks.
    """

    convolutions: tuple[Convolution, ...]
    per_token: int
    per_pair: int
    per_near_pair: int
    per_place: int

    def of(self, load: TowerLoad) -> float:
        """Operations of training on it."""
        embedding, *counts = load
        costs = (self.per_token, self.per_pair, self.per_near_pair, self.per_place)
        return float(embedding + sum(map(mul, costs, counts)))

    def embed(self, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Operations of the convolutions on something of that shape, and the shape behind them."""
        cost, here = 0, tuple(shape)
        for convolution in self.convolutions:
            here = convolution.positions(here)
            cost += convolution.per_position * prod(here)
        return cost, here


class _Walk:
    """Goes on from pixels or sounds: a matrix costs more once something before it is trained.

    Attributes:
        is_over: What comes is not used, and gets no gradients.
    """

    def __init__(self, config: Any) -> None:
        self.is_over = False
        self._config = config
        self._is_fed = False

    def of(self, modules: Iterable[nn.Module]) -> int:
        """Operations for what passes the matrices of these modules."""
        return sum(map(self._of_module, modules))

    def pairs(self, block: nn.Module) -> int:
        """Operations of the attention of a block that was passed, for two tokens."""
        found = (attention_cost(m, self._config) for m in block.modules() if is_attention(m))
        passes = TRAINING if self._is_fed and not self.is_over else 1
        return passes * sum(cost.per_pair for cost in found)

    def convolution(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Convolution:
        padding = module.padding
        if padding == "valid":
            padding = (0,) * len(module.kernel_size)
        if isinstance(padding, str):
            raise UnknownCostError
        per_position = 2 * module.weight.numel() * self._passes(module)
        return Convolution(per_position, module.kernel_size, module.stride, padding)

    def _of_module(self, module: nn.Module) -> int:
        if isinstance(module, nn.MultiheadAttention):  # pools by a query of its own
            raise UnknownCostError
        is_added = all(len(parameter) == 1 for parameter in module.parameters(recurse=False))
        cost = 0 if is_added else matrix_cost(module, self._config)  # such as a class token
        return cost * self._passes(module)

    def _passes(self, module: nn.Module) -> int:
        """How often its forward is paid for, gradients of its input and weights included."""
        if self.is_over:
            return 1
        is_trained = any(p.requires_grad for p in module.parameters(recurse=False))
        passes = 1 + self._is_fed + is_trained
        self._is_fed |= is_trained
        return passes


def count_tower_flops(
    tower: PreTrainedModel, *, beside: Sequence[nn.Module] = (), num_used: int | None = None
) -> TowerFlops | None:
    """The cost of a tower, trained as far as its parameters want gradients.

    Args:
        tower: With convolutions, repeated blocks behind them, and matrices for each feature behind
            those.
        beside: What features pass behind the tower.
        num_used: Blocks of whose outcome features are made: the others run for nothing. None for
            all.

    Returns:
        None where something is of a kind that is not known here.
    """
    try:
        return _count(tower, beside, num_used)
    except UnknownCostError:
        return None


def _count(tower: PreTrainedModel, beside: Sequence[nn.Module], num_used: int | None) -> TowerFlops:
    config, blocks = tower.config, decoder_blocks(tower)
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in tower.modules() if module not in inside]
    ways_in = [m for m in outside if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not blocks or not ways_in:
        raise UnknownCostError
    walk = _Walk(config)
    convolutions = tuple(map(walk.convolution, ways_in))
    all_seeing = getattr(config, "fullatt_block_indexes", range(len(blocks)))
    per_token, pairs = 0, {True: 0, False: 0}
    for number, block in enumerate(blocks):
        if number == num_used:
            walk.is_over = True
        per_token += walk.of(block.modules())
        pairs[number in all_seeing] += walk.pairs(block)
    walk.is_over = False
    behind = [module for module in outside if module not in ways_in]
    behind += [module for part in beside for module in part.modules()]
    return TowerFlops(convolutions, per_token, pairs[True], pairs[False], walk.of(behind))
