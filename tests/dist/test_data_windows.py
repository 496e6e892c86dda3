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
    from omnilit.data.epochs import EpochLength
    from omnilit.data.files import DataFile
    from omnilit.data.items import WindowLayout
    from omnilit.data.packing import PlanSettings
    from omnilit.data.planned import PlannedItems
    from omnilit.data.prepare import PrepareRequest, prepare
    from omnilit.data.transforms import TransformSettings
    from omnilit.data.warmup import BudgetSchedule
    from omnilit.data.window import TrainLoader
    from omnilit.parallel.collectives import run_on_first, sum_or_raise

    files = (DataFile(f"{folder}/data.jsonl", "jsonl"),)
    cache = Path(folder) / "cache"
    request = PrepareRequest(files, TransformSettings(max_seq_len=64), cache)
    info = run_on_first(lambda: prepare(request, build_tokenizer()), name="prepare")
    layout = WindowLayout(dist.get_rank(), dist.get_world_size(), 2)
    items = PlannedItems(
        open_prepared(info["path"]),
        PlanSettings(0, BudgetSchedule(64)),
        workers=WorkerSettings(1),
        fingerprint=info["path"],
        num_items=layout.num_items,
    )
    loader = TrainLoader(items, layout=layout, epochs=EpochLength(None), reduce_counts=sum_or_raise)
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


def _meet_a_fault(num_workers: int) -> tuple[str, str]:
    import torch.distributed as dist

    from omnilit.data.batches import WorkerSettings
    from omnilit.data.collate import CollateSettings
    from omnilit.data.epochs import EpochLength
    from omnilit.data.items import WindowLayout
    from omnilit.data.packing import PlanSettings
    from omnilit.data.planned import PlannedItems
    from omnilit.data.warmup import BudgetSchedule
    from omnilit.data.window import TrainLoader
    from tests.helpers.samples import CountingSource

    items = PlannedItems(
        CountingSource([4] * 12, faulty=5 if dist.get_rank() == 1 else -1),
        PlanSettings(0, BudgetSchedule(4)),
        workers=WorkerSettings(num_workers),
        fingerprint="twelve",
        num_items=2,
        # other counts than those of the plainest loader must reach the sum in an error, too
        collate=CollateSettings(sources=("train",), has_weights=True),
    )
    # each reads everything, so the fault comes on one only
    loader = TrainLoader(items, layout=WindowLayout(0, 1, 2), epochs=EpochLength(None))
    try:
        list(loader)
    except Exception as error:  # the test wants whatever comes
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_one_ranks_data_is_raised_on_all(num_workers: int, tmp_path: Path):
    first, second = run_ranks(_meet_a_fault, 2, num_workers, tmp_path=tmp_path, timeout_s=30)
    assert first[0] == "DataError"
    assert "another rank could not read its data (rank 1 failed: OSError: " in first[1]
    assert "sample 5 cannot be read" in first[1]
    assert second[0] == "OSError"
    assert "sample 5 cannot be read" in second[1]
