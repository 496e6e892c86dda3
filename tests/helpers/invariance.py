"""Samples alone and packed with others: whether their logits and losses have the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omnilit.kernels.batch_invariant import invariant_operators
from omnilit.kernels.overrides import replace_operators
from omnilit.models.attention import Segments
from omnilit.models.bind import Binding
from omnilit.types import IGNORE, MicroBatch
from tests.helpers.models import VOCAB


@dataclass(frozen=True)
class Seen:
    """What a model made of one sample: logits [T, V] and losses of its supervised tokens."""

    logits: Tensor
    losses: Tensor

    def equals(self, other: Seen) -> bool:
        """Whether all bits are the same."""
        return torch.equal(self.logits, other.logits) and torch.equal(self.losses, other.losses)


def sample_of(length: int) -> Tensor:
    """The tokens of the one sample of that length."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length))


def pack(lengths: Sequence[int]) -> MicroBatch:
    """The samples of these lengths in one row, all of their tokens but the first supervised."""
    samples = [sample_of(length) for length in lengths]
    labels = [torch.cat([tokens[1:], torch.tensor([IGNORE])]) for tokens in samples]
    return MicroBatch(
        input_ids=torch.cat(samples)[None],
        labels=torch.cat(labels)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        bounds=[0, *torch.tensor(lengths).cumsum(0).tolist()],
        origins=(),
        counts={"tokens": float(sum(lengths) - len(lengths))},
    )


def see(model: PreTrainedModel, binding: Binding, lengths: Sequence[int]) -> list[Seen]:
    """What the model makes of each sample of a row."""
    batch = pack(lengths)
    losses = binding.head.forward(model, batch).token_losses.detach()
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens_q=Segments(batch.bounds),
            use_cache=False,
        ).logits
    own_losses = losses.split([length - 1 for length in lengths])
    own_logits = logits[0].split(list(lengths))
    return [Seen(*both) for both in zip(own_logits, own_losses, strict=True)]


def depends_on_the_batch(
    model: PreTrainedModel, binding: Binding, rows: Sequence[Sequence[int]]
) -> bool:
    """Whether any sample of `rows` has other bits there than in a row of its own."""
    alone = {n: see(model, binding, [n])[0] for n in {n for row in rows for n in row}}
    return not all(
        seen.equals(alone[length])
        for row in rows
        for length, seen in zip(row, see(model, binding, row), strict=True)
    )


@contextmanager
def invariant_rows(device_type: str = "cpu") -> Iterator[None]:
    """Batch-invariant operators on this CPU, those of `device_type`."""
    undo = replace_operators(invariant_operators(device_type), "CPU")
    try:
        yield
    finally:
        undo()
