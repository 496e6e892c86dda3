"""Memory of the head's loss at a large vocabulary: chunked, and with full logits.

Run by `make bench`; each way in a process of its own, since a peak never goes down again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch

from omnilit.kernels import cross_entropy

ROWS, VOCABULARY, WIDTH = 2048, 152_064, 512


def measure(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Peak of forward and backward over what is there before: weights and hidden states."""
    torch.manual_seed(0)
    hidden = torch.empty(ROWS, WIDTH, dtype=dtype).normal_().requires_grad_()
    # in place: a peak of making them would hide as much of what is measured
    weight = torch.empty(VOCABULARY, WIDTH, dtype=dtype).normal_(std=0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = getattr(cross_entropy, name)(hidden, weight, targets)
    losses.mean().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "gb_over_weights": (after - before) * 1024 / 1e9,
        "loss": losses.mean().item(),
        "hidden_grad": hidden.grad.norm(dtype=torch.float64).item(),
        "weight_grad": weight.grad.norm(dtype=torch.float64).item(),
    }


def main() -> None:
    """Both ways in both types."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    if arguments.name:
        sys.stdout.write(json.dumps(measure(arguments.name, getattr(torch, arguments.dtype))))
        return
    sys.stdout.write(f"{ROWS} rows, vocabulary {VOCABULARY}, width {WIDTH}\n")
    for dtype in ("float32", "bfloat16"):
        for name in ("eager", "chunk_loss"):
            command = [sys.executable, "-m", "benchmarks.head_memory"]
            done = subprocess.run(
                [*command, "--name", name, "--dtype", dtype], capture_output=True, check=True
            )
            sys.stdout.write(f"{dtype:8} {name:10} {done.stdout.decode()}\n")


if __name__ == "__main__":
    main()
