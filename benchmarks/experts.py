"""Experts alone, forward and backward: ours beside transformers' implementations, in turn.

Run by `make bench`. CPU seconds a call, of the mixture that `train_speed --model moe` trains.
`batched_mm` copies the weights of an expert for each of its rows, 19 GB for a step of 2,048 tokens,
so that it is measured with few of them.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.contestants.task import MODELS
from omnilit.kernels import moe_by_expert, moe_grouped
from omnilit.parallel.host_memory import keep_freed_blocks

FEW: Final = 64
RUN: Final[dict[str, Callable[..., Tensor]]] = {
    "omnilit torch": moe_by_expert.by_expert,
    "omnilit grouped_mm": moe_grouped.grouped_mm,
    "transformers eager": inspect.unwrap(Qwen3MoeExperts.forward),
    "transformers grouped_mm": grouped_mm_experts_forward,
    "transformers batched_mm": batched_mm_experts_forward,
}


def make(dtype: torch.dtype) -> tuple[Any, Any]:
    """Experts with random weights, and their configuration."""
    config = MODELS["moe"]()
    experts = Qwen3MoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return experts, config


def measure(run: Callable[..., Tensor], experts: Any, config: Any, num_tokens: int) -> float:
    """CPU seconds of a call and its backward."""
    draw = torch.Generator().manual_seed(0)
    dtype = experts.down_proj.dtype
    hidden = torch.randn(num_tokens, config.hidden_size, generator=draw).to(dtype).requires_grad_()
    logits = torch.randn(num_tokens, config.num_experts, generator=draw)
    weights, index = logits.softmax(-1).topk(config.num_experts_per_tok)
    weights = weights.to(dtype).requires_grad_()
    along = torch.randn(num_tokens, config.hidden_size, generator=draw).to(dtype)
    started = time.process_time()
    out = run(experts, hidden, index, weights)
    torch.autograd.grad(out, (hidden, weights, *experts.parameters()), along)
    return time.process_time() - started


def main() -> None:
    """Interleave the implementations and print a table for each number of tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, FEW])
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    keep_freed_blocks()
    torch.manual_seed(0)
    experts, config = make(getattr(torch, arguments.dtype))
    for num_tokens in arguments.tokens:
        names = [name for name in RUN if num_tokens <= FEW or "batched" not in name]
        found: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(arguments.repeats + 1):
            for name in names:
                took = measure(RUN[name], experts, config, num_tokens)
                if repeat:  # the first one takes memory
                    found[name].append(took)
        ours = statistics.median(found["omnilit torch"])
        sys.stdout.write(f"{num_tokens} tokens, {arguments.dtype}, CPU s\n\n")
        sys.stdout.write("| | min | median | max | beside omnilit torch |\n|---|---|---|---|---|\n")
        for name, times in found.items():
            shown = f"{min(times):.4f} | {statistics.median(times):.4f} | {max(times):.4f}"
            sys.stdout.write(f"| {name} | {shown} | {statistics.median(times) / ours:.2f} |\n")
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
