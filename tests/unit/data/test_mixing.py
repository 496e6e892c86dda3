"""Mixtures: the file that describes one, and the order in which passes take samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from omnilit.data.mixing import MixedSamples, MixOrder
from omnilit.data.multisource import (
    Level,
    Mixture,
    SourceSpec,
    Stopping,
    is_mixture,
    read_mixture,
)
from omnilit.errors import ConfigError
from tests.helpers.samples import CountingSource

KEY = "data.train_path"


def mix(*weights: float, level: Level = "sample", stopping: Stopping = "all_exhausted") -> Mixture:
    sources = tuple(SourceSpec(str(i), "p", w / sum(weights)) for i, w in enumerate(weights))
    return Mixture(sources, level, stopping)


def order(mixture: Mixture, sizes: list[int], lengths: tuple[int, ...] = (4, 4)) -> MixOrder:
    columns = [np.full(n, length, np.int32) for n, length in zip(sizes, lengths, strict=True)]
    return MixOrder.of(mixture, columns, seed=5)


def test_a_pass_ends_with_the_last_sample_of_the_first_source_that_is_used_up():
    taken = order(mix(1, 1, stopping="first_exhausted"), [30, 500])(0)
    counts = Counter((taken >= 30).tolist())
    assert counts[False] == 30
    assert taken[-1] < 30
    assert max(Counter(taken.tolist()).values()) == 1


def test_a_pass_ends_when_every_source_was_used_up_once():
    taken = order(mix(3, 1), [30, 50])(0)
    counts = Counter(taken.tolist())
    assert set(counts) == set(range(80))
    assert taken[-1] >= 30
    assert {counts[i] for i in range(30, 80)} == {1}
    small = taken[taken < 30]
    assert sorted(small[:30].tolist()) == list(range(30))  # no repetition before all were taken
    assert small[:30].tolist() != small[30:60].tolist()


def test_sources_that_never_end_go_on_where_the_pass_before_stopped():
    endless = order(mix(1, 1, stopping="never_exhausted"), [40, 70])
    passes = [endless(i) for i in range(4)]
    assert {len(taken) for taken in passes} == {110}
    first = np.concatenate(passes)
    small = first[first < 40]
    rounds = [sorted(small[i : i + 40].tolist()) for i in range(0, len(small) - 39, 40)]
    assert len(rounds) >= 4
    assert all(found == list(range(40)) for found in rounds)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("sample", 0.7), ("token", 0.7 / 30 / (0.7 / 30 + 0.3 / 10))],
)
def test_weights_are_shares_of_samples_or_of_tokens(level: Level, expected: float):
    endless = order(mix(7, 3, level=level, stopping="never_exhausted"), [50_000] * 2, (30, 10))
    taken = endless(0) < 50_000
    assert taken.mean() == pytest.approx(expected, abs=0.01)
    tokens = taken.sum() * 30 / (taken.sum() * 30 + (~taken).sum() * 10)
    if level == "token":
        assert tokens == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted", "never_exhausted"])
def test_an_order_depends_on_seed_and_pass_alone(stopping: Stopping):
    mixture = mix(1, 2, stopping=stopping)
    one, same = order(mixture, [20, 20]), order(mixture, [20, 20])
    assert one(3).tolist() == same(3).tolist()
    assert one(3).tolist() != one(4).tolist()
    other = MixOrder(one.sizes, one.shares, one.stopping, one.seed + 1)
    assert one(0).tolist() != other(0).tolist()


def test_samples_of_all_sources_have_their_sources_name():
    data = MixedSamples([CountingSource([1, 2]), CountingSource([3])], ["a", "b"])
    assert data.lengths.tolist() == [1, 2, 3]
    found = [(data[i].origin.source, data[i].origin.row, len(data[i])) for i in range(3)]
    assert found == [("a", 0, 1), ("a", 1, 2), ("b", 0, 3)]


def write(folder: Path, **fields: object) -> str:
    file = folder / "mix.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


def test_a_mixture_is_read_with_its_defaults_and_normalised_weights(tmp_path: Path):
    sources = {"sources": ["a.jsonl", "b"], "names": ["a", "b"]}
    assert read_mixture(write(tmp_path, **sources), key=KEY) == Mixture(
        (SourceSpec("a", "a.jsonl", 0.5), SourceSpec("b", "b", 0.5))
    )
    schedule = [{"schedule_type": "const", "weights": [6, 2]}]
    more = {"level": "token", "stopping_strategy": "all_exhausted", "upstream_sharded": True}
    mixture = read_mixture(write(tmp_path, **sources, schedule=schedule, **more), key=KEY)
    assert [source.weight for source in mixture.sources] == [0.75, 0.25]
    assert (mixture.level, mixture.stopping) == ("token", "all_exhausted")
    assert is_mixture("a.yml")
    assert not is_mixture("a.jsonl")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ["a"]}, "names: 1 names for 2 sources"),
        ({"names": ["a", "a"]}, "names: a comes more than once"),
        ({"names": ["a", "b/c"]}, "names: b/c cannot be part of a metric's name"),
        ({"sources": []}, r"sources: is \[\]"),
        ({"sources": None}, "sources: is missing"),
        ({"shedule": []}, "shedule: unknown key. Did you mean 'schedule'?"),
        ({"level": "batch"}, "level: 'batch' is not known. To fix: use one of sample, token"),
        ({"stopping_strategy": "x"}, "stopping_strategy: 'x' is not known"),
        ({"schedule": [{"schedule_type": "linear", "weights": [1, 1]}]}, r"use const"),
        ({"schedule": [{"weights": [1]}]}, r"weights: 1 weights for 2 sources"),
        ({"schedule": [{"weights": [1, 0]}]}, r"\[1, 0\] is not a list of numbers above 0"),
        ({"schedule": [{"weights": [1, True]}]}, r"\[1, True\] is not a list of numbers above"),
        ({"schedule": [{"weights": [1, 1], "steps": 3}]}, "unknown keys steps"),
        ({"schedule": [{}, {}]}, "schedule: is not a list of one entry"),
        ({"source_names": ["b", "a"]}, "source_names: .* are not the names"),
        ({"upstream_sharded": 3}, "upstream_sharded: 3 is not true or false"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_told(
    tmp_path: Path, fields: dict[str, object], message: str
):
    path = write(tmp_path, **{"sources": ["a", "b"], "names": ["a", "b"], **fields})
    with pytest.raises(ConfigError, match=message) as caught:
        read_mixture(path, key=KEY)
    assert str(caught.value).startswith(f"{KEY}: {path}")


def test_all_problems_of_a_mixture_are_told_together(tmp_path: Path):
    path = write(tmp_path, sources=["a"], names=["a"], level="x", stopping_strategy="y", odd=1)
    with pytest.raises(ConfigError) as caught:
        read_mixture(path, key=KEY)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["[", "- a", None])
def test_a_file_that_is_no_mixture_is_named(tmp_path: Path, text: str | None):
    file = tmp_path / "mix.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"cannot be read|holds no keys"):
        read_mixture(str(file), key=KEY)
