"""How a row is divided among ranks, and what becomes of a micro-batch's counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from omnilit.models.flops import AttentionCost, ModelFlops
from omnilit.modules.meter import sum_by_source
from omnilit.parallel.sequence import SequenceLayout, pad_row, split_sequence
from omnilit.types import IGNORE, MicroBatch, Origin
from tests.helpers.models import packed_batch

LAYOUTS = [SequenceLayout(*sizes) for sizes in [(1, 2), (1, 3), (2, 1), (4, 1), (2, 2), (3, 4)]]


def parts_of(batch: MicroBatch, layout: SequenceLayout) -> list[MicroBatch]:
    return [split_sequence(batch, layout, rank) for rank in range(layout.num_parts)]


def place_of(part: MicroBatch) -> torch.Tensor:
    assert part.row_index is not None
    return part.row_index[0]


def mixed_batch(lengths: tuple[int, ...] = (5, 1, 11, 8)) -> MicroBatch:
    """Segments of two sources in turn, with weights."""
    batch = packed_batch(lengths, seed=1)
    origins = tuple(Origin("ab"[row % 2], "f.jsonl", row + 1) for row in range(len(lengths)))
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(2))
    counts: dict[str, float] = {"tokens": 0, "weight": 0.0, "tokens/a": 0, "tokens/b": 0}
    for (start, end), origin in zip(pairwise(batch.bounds), origins, strict=True):
        is_label = batch.labels[0, start:end] != IGNORE
        counts["tokens"] += int(is_label.sum())
        counts[f"tokens/{origin.source}"] += int(is_label.sum())
        counts["weight"] += float(weights[0, start:end][is_label].sum())
    return replace(batch, origins=origins, weights=weights, counts=counts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("more", [0, 1, 5])
def test_the_parts_are_the_row(layout, more):
    batch = mixed_batch((5, 1, 11, 7 + more))
    padded, parts = pad_row(batch, layout.multiple), parts_of(batch, layout)
    index = torch.cat([place_of(part) for part in parts])
    assert sorted(index.tolist()) == list(range(padded.bounds[-1]))
    for name in ("input_ids", "labels", "position_ids", "weights"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined[0, index.argsort()], getattr(padded, name)[0]), name
    assert {part.num_parts for part in parts} == {layout.num_parts}
    assert {tuple(part.bounds) for part in parts} == {tuple(padded.bounds)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_counts_of_the_parts_add_up_to_those_of_the_row(layout):
    batch = mixed_batch()
    batch = replace(batch, counts={**batch.counts, "pairs": 2})
    parts = parts_of(batch, layout)
    assert {tuple(part.counts) for part in parts} == {tuple(batch.counts)}
    for name, count in batch.counts.items():
        assert sum(part.counts[name] for part in parts) == pytest.approx(count, rel=1e-6), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_go_to_the_source_of_their_record(layout):
    batch = mixed_batch()
    losses = torch.arange(1.0, 1 + batch.labels.numel()).view(1, -1)
    expected = sum_by_source(losses[batch.labels != IGNORE], batch, ["a", "b"])
    row_losses = torch.cat((losses[0], torch.zeros(layout.multiple)))
    found = torch.zeros(2, dtype=torch.float64)
    for part in parts_of(batch, layout):
        own = row_losses[place_of(part)][part.labels[0] != IGNORE]
        found += sum_by_source(own, part, ["a", "b"])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operations_of_the_parts_are_those_of_the_row_without_padding(layout):
    model = ModelFlops(per_token=10, per_target=7, attention=(AttentionCost(4, 3),))
    batch = mixed_batch()
    found = sum(model.of_batch(part) for part in parts_of(batch, layout))
    assert found == pytest.approx(model.of_batch(batch), rel=1e-12)


def test_padding_is_a_segment_without_labels_that_counts_nothing():
    batch = mixed_batch()
    padded = pad_row(batch, 8)
    assert padded.bounds == [*batch.bounds, 32]
    assert (padded.num_tokens, padded.num_padding) == (batch.num_tokens, 7)
    assert padded.position_ids[0, -7:].tolist() == list(range(7))
    assert set(padded.labels[0, -7:].tolist()) == {IGNORE}
    again = pad_row(padded, 36)
    assert again.bounds == [*batch.bounds, 36]
    assert again.position_ids[0, -11:].tolist() == list(range(11))
    assert (again.num_tokens, again.num_padding) == (batch.num_tokens, 11)
    assert pad_row(again, 9) is again


def test_a_micro_batch_that_only_fills_a_window_stays_one():
    filler = replace(packed_batch((2,)), origins=(), counts={"tokens": 0, "tokens/a": 0})
    filler.labels.fill_(IGNORE)
    for part in parts_of(filler, SequenceLayout(2, 2)):
        assert part.input_ids.shape == (1, 1)
        assert (part.num_tokens, part.counts) == (0, {"tokens": 0, "tokens/a": 0})


def test_one_rank_has_the_micro_batch_as_it_is():
    batch = mixed_batch()
    assert split_sequence(batch, SequenceLayout(), 0) is batch


@pytest.mark.parametrize("layout", [SequenceLayout(1, 4), SequenceLayout(4, 2)], ids=str)
def test_ulysses_splits_a_part_in_order(layout):
    bounds = (0, 5, 2 * layout.multiple)
    for cp_rank in range(layout.cp_size):
        ranks = range(cp_rank * layout.ulysses_size, (cp_rank + 1) * layout.ulysses_size)
        index = torch.cat([layout.index(rank, bounds) for rank in ranks])
        spans = layout.spans(cp_rank, bounds)
        assert index.tolist() == [at for start, end in spans for at in range(start, end)]


@pytest.mark.parametrize("layout", [*LAYOUTS, SequenceLayout(2, 3)], ids=str)
@pytest.mark.parametrize("bounds", [(0, 96), (0, 7, 30, 96)], ids=str)
def test_units_in_their_order_are_what_ranks_hold(layout, bounds):
    held = torch.cat([layout.index(rank, bounds) for rank in range(layout.num_parts)])
    units = torch.arange(bounds[-1]).chunk(layout.multiple)
    assert torch.equal(torch.cat([units[number] for number in layout.unit_order(bounds)]), held)


@pytest.mark.parametrize(
    ("bounds", "order"),
    [
        ((0, 24), [0, 7, 1, 6, 2, 5, 3, 4]),
        ((0, 0, 24, 24), [0, 7, 1, 6, 2, 5, 3, 4]),
        ((0, 12, 24), [0, 7, 3, 4, 1, 6, 2, 5]),  # chunks 0 and 4 see least, 3 and 7 most
    ],
)
def test_chunks_that_see_least_are_held_with_those_that_see_most(bounds, order):
    assert SequenceLayout(4).chunk_order(bounds) == order


def pairs_by_rank(layout: SequenceLayout, lengths: tuple[int, ...]) -> list[int]:
    """Queries times the keys that they see, of each rank."""
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    parts = [layout.index(rank, bounds) for rank in range(layout.num_parts)]
    return [int(seen[part].sum()) for part in parts]


@pytest.mark.parametrize("cp_size", [2, 3, 8])
def test_parts_of_one_long_sequence_see_equally_many_pairs(cp_size):
    pairs = pairs_by_rank(SequenceLayout(cp_size), (960,))
    assert pairs == [960 * 961 // 2 // cp_size] * cp_size


@pytest.mark.parametrize("cp_size", [2, 3, 8])
@pytest.mark.parametrize("lengths", [(500, 460), (1, 700, 259), (60,) * 16])
def test_parts_of_packed_sequences_see_nearly_equally_many_pairs(cp_size, lengths):
    pairs = pairs_by_rank(SequenceLayout(cp_size), lengths)
    assert max(pairs) < 1.2 * sum(pairs) / cp_size
