"""The router's balance loss: the reference of the slot `load_balancing_loss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def eager(
    router_logits: Sequence[Tensor],
    *,
    num_experts: int,
    top_k: int,
    is_real: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """How unevenly tokens are spread over experts: `top_k` when even, more otherwise.

    With f_e the share of routed slots a token gives to expert e and P_e the mean probability
    of e, both over the tokens of all layers, the loss is E * sum_e f_e P_e. Only P has gradient.

    Ranks that hold parts of the same tokens count f together, and each adds its own part of P.
    The loss is not linear in the tokens, so a mean of the parts' own losses would be another one.

    Args:
        router_logits: One tensor [T, E] a layer.
        num_experts: E.
        top_k: Experts a token is sent to.
        is_real: True for the tokens [T] that count; all where None.
        group: The ranks that hold the other tokens; None where this one holds all. Each calls.

    Returns:
        A float32 scalar; with a group this rank's share, which add up over it to the loss.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, with top_k > 1.
    """
    logits = torch.cat([layer if is_real is None else layer[is_real] for layer in router_logits])
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    slots = torch.bincount(chosen.flatten(), minlength=num_experts)
    counts = torch.cat([slots, slots.new_tensor([logits.shape[0]])])
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(counts, group=group)
    slots_E, num_rows = counts[:-1].float(), counts[-1].clamp(min=1)
    return num_experts * (slots_E / num_rows * (probabilities.sum(0) / num_rows)).sum()
