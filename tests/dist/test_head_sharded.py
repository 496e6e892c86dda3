"""The head as the loss, under FSDP2 on two ranks, beside one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from omnilit.config import OpsImplementationConfig
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.bind import bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.parallel.fsdp import shard_model
from omnilit.testing import run_ranks
from tests.helpers.models import gradients, packed_batch, reference_loss, tiny, worst_difference


def micro_batches(keep_last: float):
    return packed_batch((9, 4, 11), seed=3), packed_batch((16, 2), seed=4, keep=keep_last)


def train_sharded(family: str, keep_last: float) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny(family)
    kernels = resolve_kernels(OpsImplementationConfig(), given=frozenset(), machine=Machine("cpu"))
    binding = bind_kernels(model, kernels)
    shard_model(
        model,
        units=decoder_blocks(model),
        mesh=init_device_mesh("cpu", (2,)),
        policy=MixedPrecisionPolicy(),
        reshard_after_forward=True,
    )
    batches = micro_batches(keep_last)
    batch = batches[torch.distributed.get_rank()]
    loss = binding.head.forward(model, batch).token_losses.sum()
    (loss / sum(b.counts["tokens"] for b in batches)).backward()
    binding.verify_called()
    found = {}
    for name, gradient in gradients(model).items():
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss.item(), found


CASES = [(family, keep) for family in ("qwen3", "qwen3_tied", "gemma2") for keep in (0.7, 0.0)]


def train_all() -> list[tuple[float, dict[str, torch.Tensor]]]:
    return [train_sharded(family, keep_last) for family, keep_last in CASES]


@pytest.mark.dist
def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    results = run_ranks(train_all, 2, tmp_path=tmp_path)
    for case, (family, keep_last) in enumerate(CASES):
        plain, batches = tiny(family), micro_batches(keep_last)
        tokens = [batch.counts["tokens"] for batch in batches]
        sums = [reference_loss(plain, b) * max(1, n) for b, n in zip(batches, tokens, strict=True)]
        (torch.stack(sums).sum() / sum(tokens)).backward()
        for rank, expected in enumerate(sums):
            loss, found = results[rank][case]
            assert loss == pytest.approx(expected.item(), rel=1e-5), (family, keep_last, rank)
            assert worst_difference(found, gradients(plain)) <= 1e-5, (family, keep_last, rank)
