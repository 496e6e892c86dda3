"""A loop written by hand for this model, with every gain but compile, fused weights and malloc.

Weights in the compute type under float32 masters, attention a document at a time, the head at
supervised tokens only, fused AdamW and RMSNorm, best-fit packing.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.contestants.task import BETAS, LR, STEP_TOKENS, Meter, read_samples

Pack = tuple[Tensor, Tensor, Tensor, list[int]]  # ids, labels, positions, bounds


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each document."""
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, a:b],
            k[:, :, a:b],
            v[:, :, a:b],
            is_causal=b - a > 1,
            scale=kwargs["scaling"],
            enable_gqa=True,
        )
        for a, b in pairwise(kwargs["cu_seq_lens_q"])
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def norm(self: Any, hidden: Tensor) -> Tensor:
    """RMSNorm in one kernel."""
    return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.variance_epsilon)


def read_packs(folder: Path) -> list[Pack]:
    """Conversations packed by best fit, the longest first; each pack is a step."""
    samples = read_samples(folder)
    room: list[int] = []
    bins: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i][0])):
        size = min(len(samples[i][0]), STEP_TOKENS)
        fitting = [(left, b) for b, left in enumerate(room) if left >= size]
        if fitting:
            _, place = min(fitting)
        else:
            place = len(bins)
            bins.append([])
            room.append(STEP_TOKENS)
        bins[place].append(i)
        room[place] -= size
    np.random.default_rng(0).shuffle(bins)  # type: ignore[arg-type]
    return [_pack([samples[i] for i in members]) for members in bins]


def _pack(samples: list[tuple[list[int], list[int]]]) -> Pack:
    ids, labels, positions, bounds = [], [], [], [0]
    for own, targets in samples:
        kept = own[:STEP_TOKENS]
        ids += kept
        labels += [*targets[: len(kept)][1:], -100]
        positions += range(len(kept))
        bounds.append(len(ids))
    return torch.tensor([ids]), torch.tensor(labels), torch.tensor([positions]), bounds


def main() -> None:
    """Train some steps and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    compute = getattr(torch, arguments.dtype)
    ALL_ATTENTION_FUNCTIONS.register("by_document", attend)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model", dtype=torch.float32)
    model.set_attn_implementation("by_document")
    for module in model.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.forward = MethodType(norm, module)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    if compute is torch.float32:
        masters = list(model.parameters())
    model.to(compute).train()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    meter = Meter(arguments.steps)
    for ids, labels, positions, bounds in read_packs(arguments.folder)[: arguments.steps]:
        rows = (labels != -100).nonzero()[:, 0]
        hidden = model.model(
            input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False
        ).last_hidden_state[0, rows]
        logits = F.linear(hidden, model.lm_head.weight)
        loss = F.cross_entropy(logits.float(), labels[rows])
        loss.backward()
        if masters is not weights and compute is not torch.float32:
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if compute is not torch.float32:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        meter.step(ids.numel(), loss.item())
    meter.report()


if __name__ == "__main__":
    main()
