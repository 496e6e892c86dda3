"""Greedy completions of a few prompts, by all ranks of a run together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from omnilit.data.prompts import PromptSet, sequence_of
from omnilit.modules.assembly import AssembledModel
from omnilit.parallel.mesh import Topology
from omnilit.types import MicroBatch, Sample


@dataclass(slots=True)
class Draft:
    """A prompt, and what the model went on with so far.

    Args:
        prompt: The sample that it goes on from.
        limit: Tokens that it may get.
        tokens: Those that it has got, without the one that ended it.
        is_done: Whether it gets no more.
    """

    prompt: Sample
    limit: int
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    def take(self, token: int, stop: Collection[int]) -> None:
        """Add a token, or end with it."""
        if token in stop:
            self.is_done = True
            return
        self.tokens.append(token)
        self.is_done = len(self.tokens) >= self.limit

    def sample(self) -> Sample:
        """What the model reads to choose the next token."""
        return sequence_of(self.prompt, [*self.prompt.input_ids.tolist(), *self.tokens])


def complete_together(
    model: AssembledModel,
    topology: Topology,
    prompts: PromptSet,
    *,
    max_tokens: int,
    stop: Collection[int],
    place: Callable[[MicroBatch], MicroBatch],
) -> list[list[int]]:
    """Go on from every prompt with the likeliest tokens; every rank calls with the same prompts.

    There is no cache: each token is one forward pass over a packed row, as in training, so it
    works on every axis that training works on. The ranks that read different data share the
    prompts out; each token of all of them goes to all ranks, so that they end together.

    Args:
        model: In evaluation mode.
        topology: The meshes of the run.
        prompts: What to go on from.
        max_tokens: Tokens of a completion at most.
        stop: Tokens that end one.
        place: Puts this rank's part of a micro-batch on its device.

    Returns:
        The tokens of each completion, the same on all ranks.
    """
    room = prompts.max_seq_len
    samples = [one.prompt for one in prompts.prompts]
    drafts = [Draft(one, min(max_tokens, room - len(one))) for one in samples]
    own = range(topology.data_rank, len(drafts), topology.data_size)
    while not all(draft.is_done for draft in drafts):
        row = choose_row(drafts, own, budget=prompts.budget)
        batch = place(prompts.pack([drafts[number].sample() for number in row]))
        found = torch.zeros(len(drafts), dtype=torch.int64, device=topology.device)
        if (tokens := find_next(model, batch, len(row), topology)) is not None:
            found[row] = tokens + 1  # 0 is where nobody says anything
        if dist.get_world_size() > 1:
            dist.all_reduce(found)
        for draft, token in zip(drafts, found.tolist(), strict=True):
            if token:
                draft.take(token - 1, stop)
    return [draft.tokens for draft in drafts]


def choose_row(drafts: Sequence[Draft], own: Sequence[int], *, budget: int) -> list[int]:
    """Which drafts go on in the next forward pass: as many as fit when they are complete.

    Args:
        drafts: All of them.
        own: Numbers of those that are this rank's; a later one begins as an earlier one ends.
        budget: Tokens of a row; one draft always fits.
    """
    row: list[int] = []
    for number in own:
        draft = drafts[number]
        if draft.is_done:
            continue
        budget -= len(draft.prompt) + draft.limit
        if row and budget < 0:
            break
        row.append(number)
    return row


def find_next(
    model: AssembledModel, batch: MicroBatch, number: int, topology: Topology
) -> Tensor | None:
    """The likeliest token behind each of the first segments of a row; every rank calls.

    Args:
        model: In evaluation mode.
        batch: This rank's part of the row.
        number: Segments to go on from.
        topology: The meshes of the run.

    Returns:
        int64 [number], less 1 where another rank that shares the row has the segment's end; None
        where another rank speaks for all of them.
    """
    last = [end - 1 for end in batch.bounds[1 : number + 1]]
    ends = torch.tensor(last, dtype=torch.int64, device=topology.device)
    index = batch.row_index
    places = torch.arange(batch.bounds[-1], device=ends.device) if index is None else index[0]
    here, segments = (places[:, None] == ends).nonzero(as_tuple=True)
    logits = model.next_logits(batch, here)
    if logits is None or topology.tp_rank != 0:
        return None
    tokens = torch.full_like(ends, -1)
    tokens[segments] = logits.argmax(-1)
    return tokens
