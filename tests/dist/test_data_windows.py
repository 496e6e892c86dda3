"""Data over real ranks: one prepares, all read, and the counts of a step agree."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from omnilit.testing import run_ranks
from tests.helpers.tokenizers import build_tokenizer

pytestmark = pytest.mark.dist
NUM_RECORDS = 40


def _read(folder: str) -> list[tuple[list[int], float, int]]:
    import torch.distributed as dist

    from omnilit.data.batches import WorkerSettings
    from omnilit.data.cache import open_prepared
    from omnilit.data.packing import PlanSettings
    from omnilit.data.prepare import PrepareRequest, prepare
    from omnilit.data.transforms import TransformSettings
    from omnilit.data.window import TrainLoader, WindowLayout
    from omnilit.parallel.collectives import run_on_first, sum_over

    files, cache = (Path(folder) / "data.jsonl",), Path(folder) / "cache"
    request = PrepareRequest(files, TransformSettings(max_seq_len=64), cache)
    info = run_on_first(lambda: prepare(request, build_tokenizer()), name="prepare")
    loader = TrainLoader(
        open_prepared(info["path"]),
        plan=PlanSettings(0, 64),
        layout=WindowLayout(dist.get_rank(), dist.get_world_size(), 2),
        steps_per_epoch=None,
        workers=WorkerSettings(1),
        reduce_counts=sum_over,
    )
    read = []
    for batch in loader:
        assert batch.stamp is not None
        rows = [origin.row for origin in batch.origins]
        read.append((rows, batch.stamp.counts["tokens"], batch.counts["tokens"]))
    return read


def test_two_ranks_read_every_record_once_and_agree_on_the_counts(tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * i}]}
        for i in range(NUM_RECORDS)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = run_ranks(_read, 2, str(tmp_path), tmp_path=tmp_path)
    read = Counter(row for rows, _, _ in [*first, *second] for row in rows)
    assert read == Counter(range(1, NUM_RECORDS + 1))
    for start in range(0, len(first), 2):
        window = first[start : start + 2] + second[start : start + 2]
        assert {stamped for _, stamped, _ in window} == {sum(own for _, _, own in window)}
