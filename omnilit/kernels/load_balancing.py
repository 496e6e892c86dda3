"""The router's balance loss: the reference of the slot `load_balancing_loss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def eager(
    router_logits: Sequence[Tensor], *, num_experts: int, top_k: int, is_real: Tensor | None = None
) -> Tensor:
    """What layers add to the loss, which is a function of the sum over all of them.

    So a pipeline's stages and ranks that hold parts of the same tokens add up what a kernel gives.

    Args:
        router_logits: One tensor [T, E] a layer; at least one.
        num_experts: E.
        top_k: Experts a token is sent to.
        is_real: True for the tokens [T] that count; all where None.

    Returns:
        Routed slots and probabilities of each expert, and rows, [2 E + 1]; float32. Only the
        probabilities have gradient.
    """
    logits = torch.cat([layer if is_real is None else layer[is_real] for layer in router_logits])
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    slots = torch.bincount(chosen.flatten(), minlength=num_experts)
    rows = slots.new_tensor([logits.shape[0]])
    return torch.cat([slots.float(), probabilities.sum(0), rows.float()])


def of_sums(sums: Tensor, *, num_experts: int, group: ProcessGroup | None = None) -> Tensor:
    """How unevenly tokens are spread over experts: `top_k` when even, more otherwise.

    With f_e the share of routed slots a token gives to expert e and P_e the mean probability
    of e, both over the tokens of all layers, the loss is E * sum_e f_e P_e. Only P has gradient.

    Ranks that hold parts of the same tokens count f together, and each adds its own part of P.
    The loss is not linear in the tokens, so a mean of the parts' own losses would be another one.

    Args:
        sums: What the kernel gave of all layers, added up.
        num_experts: E.
        group: The ranks that hold the other tokens; None where this one holds all. Each calls.

    Returns:
        A float32 scalar; with a group this rank's share, which add up over it to the loss.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, with top_k > 1.
    """
    slots_E, probabilities_E, rows = sums.split([num_experts, num_experts, 1])
    counts = torch.cat([slots_E, rows]).detach()
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(counts, group=group)
    slots_E, num_rows = counts[:-1], counts[-1].clamp(min=1)
    return num_experts * (slots_E / num_rows * (probabilities_E / num_rows)).sum()
