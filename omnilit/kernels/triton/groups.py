"""Which rows belong to which expert: sorted by expert, and cut into tiles for the kernels."""

# T tokens, k experts a token is sent to, S = T k routed slots, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

TILE: Final = 64  # rows of one expert that a program works on


@dataclass(frozen=True, slots=True)
class Groups:
    """Routed slots in the order of their experts; nothing here is known to the host.

    Slots of ids past the last expert come last, as a group of their own: number E.

    Args:
        starts: Where each group begins, and the number of slots, int32 [E + 2].
        tile_group: The group of each tile; E + 1 for tiles that are not needed, int32.
        tile_start: The first slot of each tile, int32.
        token: The token of each slot, int32 [S].
        place: The slot of each choice of each token, int32 [T, k].
        num_experts: E.
    """

    starts: Tensor
    tile_group: Tensor
    tile_start: Tensor
    token: Tensor
    place: Tensor
    num_experts: int


def sort_slots(top_k_index: Tensor, num_experts: int) -> Groups:
    """Bring the slots of each expert together, in the order of their tokens.

    Sizes depend on T, k and E alone, so the host waits for nothing.

    Args:
        top_k_index: The experts of each token [T, k]; an id past the last one is skipped.
        num_experts: E.
    """
    num_slots, device = top_k_index.numel(), top_k_index.device
    expert_S = top_k_index.reshape(-1).clamp(max=num_experts)
    sorted_S, slot_S = torch.sort(expert_S, stable=True)
    place = torch.empty_like(slot_S)
    place[slot_S] = torch.arange(num_slots, device=device)
    ids = torch.arange(num_experts + 2, device=device)
    starts = torch.searchsorted(sorted_S, ids)
    first_tile = torch.zeros_like(ids)
    torch.cumsum((starts.diff() + TILE - 1) // TILE, 0, out=first_tile[1:])
    tile = torch.arange(num_slots // TILE + num_experts + 1, device=device)
    group = torch.searchsorted(first_tile[1:], tile, right=True)
    start = starts[group] + (tile - first_tile[group]) * TILE
    return Groups(
        starts=starts.int(),
        tile_group=group.int(),
        tile_start=start.int(),
        token=(slot_S // top_k_index.shape[-1]).int(),
        place=place.view(top_k_index.shape).int(),
        num_experts=num_experts,
    )
