"""The head as the loss, under FSDP2 on two ranks, beside one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from omnilit.models.blocks import decoder_blocks
from omnilit.testing import run_ranks
from tests.helpers.gradients import gradients_of
from tests.helpers.models import gradients, packed_batch, reference_loss, tiny, worst_difference
from tests.helpers.spread import spread, topology_of


def micro_batches(keep_last: float):
    return packed_batch((9, 4, 11), seed=3), packed_batch((16, 2), seed=4, keep=keep_last)


def train_sharded(
    family: str, keep_last: float, recompute: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny(family)
    binding = spread(model, topology_of(), recompute=recompute)
    batches = micro_batches(keep_last)
    batch = batches[torch.distributed.get_rank()]
    loss = binding.head.forward(model, batch).token_losses.sum()
    (loss / sum(b.counts["tokens"] for b in batches)).backward()
    binding.verify_called()
    return loss.item(), gradients_of(model)


CASES = [(family, keep) for family in ("qwen3", "qwen3_tied", "gemma2") for keep in (0.7, 0.0)]


def train_all() -> list[tuple[float, dict[str, torch.Tensor]]]:
    plain = [train_sharded(family, keep_last, False) for family, keep_last in CASES]
    return plain + [train_sharded("qwen3", keep_last, True) for keep_last in (0.7, 0.0)]


@pytest.mark.dist
def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    results = run_ranks(train_all, 2, tmp_path=tmp_path)
    for case, (family, keep_last) in enumerate([*CASES, ("qwen3", 0.7), ("qwen3", 0.0)]):
        plain, batches = tiny(family), micro_batches(keep_last)
        tokens = [batch.counts["tokens"] for batch in batches]
        sums = [reference_loss(plain, b) * max(1, n) for b, n in zip(batches, tokens, strict=True)]
        (torch.stack(sums).sum() / sum(tokens)).backward()
        for rank, expected in enumerate(sums):
            loss, found = results[rank][case]
            assert loss == pytest.approx(expected.item(), rel=1e-5), (family, keep_last, rank)
            assert worst_difference(found, gradients(plain)) <= 1e-5, (family, keep_last, rank)


def count_gathered(family: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Elements of the parameters that are gathered when each part begins, forward and backward."""
    model = tiny(family)
    binding = spread(model, topology_of(), forward_prefetch=False)
    seen: list[tuple[str, int]] = []

    def note(name: str) -> None:
        whole = [p.numel() for p in model.parameters() if not isinstance(p, DTensor)]
        seen.append((name, sum(whole)))

    def watch_backward(_: nn.Module, given: object, output: torch.Tensor, *, name: str) -> None:
        output.register_hook(lambda _: note(name))

    parts = {
        "embedding": model.get_input_embeddings(),
        **{f"block {number}": block for number, block in enumerate(decoder_blocks(model))},
        "head": model.get_output_embeddings(),
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: note(name))
        part.register_forward_hook(partial(watch_backward, name=f"{name}'s backward"))
    binding.head.forward(model, micro_batches(0.7)[0]).token_losses.sum().backward()
    units = [name for name, part in parts.items() if isinstance(part, FSDPModule)]
    return seen, units


def count_both() -> list[tuple[list[tuple[str, int]], list[str]]]:
    return [count_gathered(family) for family in ("qwen3", "qwen3_tied")]


@pytest.mark.dist
def test_embedding_and_head_are_gathered_only_while_they_compute_unless_they_are_tied(tmp_path):
    (seen, units), (_, tied) = run_ranks(count_both, 2, tmp_path=tmp_path)[0]
    plain = tiny("qwen3")
    norm = plain.model.norm.weight.numel()
    ends = plain.lm_head.weight.numel()
    block = sum(p.numel() for p in plain.model.layers[0].parameters())
    assert units == ["embedding", "block 0", "block 1", "head"]
    assert tied == ["block 0", "block 1"]
    assert seen == [
        ("embedding", norm + ends),
        ("block 0", norm + block),
        ("block 1", norm + block),
        ("head", norm + ends),
        ("head's backward", norm + ends),
        ("block 1's backward", norm + block),
        ("block 0's backward", norm + block),
        ("embedding's backward", norm),
    ]
