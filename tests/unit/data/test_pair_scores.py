"""Numbers of pairs, found by their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from omnilit.data.cache import COMPLETE, INFO, TokenDataset, TokenFile, pack_batch
from omnilit.data.pair_scores import PairScoreTable, is_saved
from omnilit.errors import ConfigError
from omnilit.types import Origin, Sample


def prepare(
    folder: Path, rows: Sequence[tuple[int, int, int]], files: Sequence[str]
) -> TokenDataset:
    """Prepared pairs, each of a file, a row in it, and made of one token again and again."""
    folder.mkdir()
    samples = []
    for file, row, token in rows:
        ids = np.full(6, token, np.int32)
        samples.append((Sample(ids, ids, Origin("s", files[file], row), None, 3), file))
    with TokenFile(folder / "part") as part:
        part.write(pack_batch(samples))
    info = {"files": list(files), "parts": ["part"], "counts": {"num_weighted": 0}}
    (folder / INFO).write_text(json.dumps(info))
    (folder / COMPLETE).touch()
    return TokenDataset(folder, source="s")


def test_a_pair_is_found_by_file_and_row_and_comes_back_from_disk(tmp_path):
    rows = [(1, 7, 5), (0, 7, 6), (1, 2, 7), (0, 2**35, 8)]
    table = PairScoreTable(prepare(tmp_path / "data", rows, ["a", "b"]))
    found = [table.find(Origin("s", name, row)) for name, row in (("b", 7), ("a", 7), ("b", 2))]
    assert None not in found
    assert len({*found, table.find(Origin("s", "a", 2**35))}) == 4
    table.values[:] = np.arange(8).reshape(4, 2)
    assert not is_saved(tmp_path / "scores")
    table.save(tmp_path / "scores")
    assert is_saved(tmp_path / "scores")
    other = PairScoreTable(prepare(tmp_path / "again", rows, ["a", "b"]))
    other.load(tmp_path / "scores")
    assert (other.values == table.values).all()


@pytest.mark.parametrize(
    "origin", [Origin("other", "a", 1), Origin("s", "b", 1), Origin("s", "a", 2)]
)
def test_a_record_of_another_place_is_not_found(tmp_path, origin):
    table = PairScoreTable(prepare(tmp_path / "data", [(0, 1, 5)], ["a"]))
    assert table.find(Origin("s", "a", 1)) == 0
    assert table.find(origin) is None


def test_a_file_that_is_named_twice_has_each_pair_once(tmp_path):
    data = prepare(tmp_path / "data", [(0, 1, 5), (1, 1, 5), (1, 2, 6)], ["a", "a"])
    table = PairScoreTable(data)
    assert [table.find(Origin("s", "a", row)) for row in (1, 2)] == [0, 1]


def test_several_pairs_of_a_record_are_refused(tmp_path):
    data = prepare(tmp_path / "data", [(0, 1, 5), (0, 1, 6)], ["a"])
    message = r"dpo_config\.precompute_reference: data\.transform makes several pairs of a record"
    with pytest.raises(ConfigError, match=message):
        PairScoreTable(data)
