import torch

from omnilit.losses.lm import lm_terms
from omnilit.modules.meter import TermMeter, sum_by_source
from omnilit.types import IGNORE, MicroBatch, Origin


def make_batch(counts, origins, bounds, is_label):
    labels = torch.where(torch.tensor([is_label]), 7, IGNORE)
    return MicroBatch(
        input_ids=torch.zeros_like(labels),
        labels=labels,
        position_ids=torch.zeros_like(labels),
        bounds=bounds,
        origins=tuple(Origin(name, "f", 1) for name in origins),
        counts=counts,
    )


def two_sources():
    counts = {"tokens": 3, "tokens/a": 2, "tokens/b": 1}
    # the third segment is padding
    return make_batch(counts, ["b", "a"], [0, 2, 5, 6], [True, False, True, True, False, False])


def test_an_empty_meter_reads_nothing():
    totals = TermMeter().read_totals(dict)
    assert (totals.means, totals.counts, totals.source_means) == ({}, {}, {})


def test_a_mean_is_over_all_targets_and_a_source_mean_over_its_own():
    meter = TermMeter()
    meter.add(lm_terms(torch.tensor([1.0, 2.0, 4.0])), two_sources())
    totals = meter.read_totals(dict)
    assert totals.means == {"lm": 7 / 3}
    assert totals.source_means == {"b": 1.0, "a": 3.0}
    assert totals.source_tokens == {"a": 2, "b": 1}


def test_a_source_without_a_token_has_no_mean():
    meter = TermMeter()
    batch = make_batch({"tokens": 1, "tokens/a": 1, "tokens/b": 0}, ["a"], [0, 2], [True, False])
    meter.add(lm_terms(torch.tensor([2.0])), batch)
    assert meter.read_totals(dict).source_means == {"a": 2.0}


def test_what_only_fills_a_window_adds_nothing_to_any_source():
    batch = make_batch({"tokens": 0, "tokens/a": 0, "tokens/b": 0}, [], [0, 2], [False, False])
    assert sum_by_source(torch.zeros(0), batch, ["a", "b"]).tolist() == [0.0, 0.0]


def test_weights_make_the_mean_a_weighted_one():
    meter = TermMeter()
    batch = make_batch({"tokens": 2, "weight": 2.5}, ["a"], [0, 3], [True, True, False])
    meter.add(lm_terms(torch.tensor([1.0, 3.0]), weights=torch.tensor([2.0, 0.5])), batch)
    assert meter.read_totals(dict).means == {"lm": 3.5 / 2.5}
