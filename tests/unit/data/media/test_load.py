"""Images that turn out to be damaged only when they are decoded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnilit.data.batches import WorkerSettings
from omnilit.data.cache import TokenDataset, open_prepared
from omnilit.data.collate import CollateSettings
from omnilit.data.evaluation import EvalLoader
from omnilit.data.files import list_files
from omnilit.data.items import WindowLayout
from omnilit.data.packing import PlanSettings
from omnilit.data.planned import PlannedItems
from omnilit.data.prepare import PrepareRequest, prepare
from omnilit.data.quarantine import BadRecord, Skipping
from omnilit.data.transforms import TransformSettings
from omnilit.data.warmup import BudgetSchedule
from omnilit.data.window import EpochLength, TrainLoader
from omnilit.errors import DataError
from tests.helpers.media_runs import ask
from tests.helpers.processors import media_processor, write_image

NUMBER = 6
MEDIA = media_processor()


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    """Prepared records of an image each, of which the third lost its end."""
    rows = []
    for index in range(NUMBER):
        name = write_image(tmp_path / f"{index}.png", seed=index)
        content = [{"type": "image", "image": name}]
        said = {"role": "assistant", "content": "Yes."}
        rows.append({"messages": [{"role": "user", "content": content}, said]})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    files = tuple(list_files(str(tmp_path / "d.jsonl"), key="data.train_path"))
    request = PrepareRequest(files, TransformSettings(max_seq_len=100), tmp_path / "cache")
    info = prepare(request, MEDIA.processor.tokenizer, media=MEDIA)
    assert info["num_bad"] == 0  # its head is whole
    return open_prepared(info["path"], files=info["files"])


def loader(
    dataset: TokenDataset, bad: list[BadRecord], *, is_silent: bool, limit: float, workers: int = 0
) -> TrainLoader:
    items = PlannedItems(
        dataset,
        PlanSettings(0, BudgetSchedule(120), None, 2, drop_last=False),
        workers=WorkerSettings(workers),
        fingerprint="x",
        collate=CollateSettings(media=MEDIA, is_silent=is_silent),
        skipping=Skipping(bad.extend, limit),
    )
    return TrainLoader(items, layout=WindowLayout(), epochs=EpochLength(None, None, 0.0))


def test_records_that_were_skipped_come_back_once_their_images_are_mended(tmp_path: Path):
    names = [f"{index}.png" for index in range(3)]
    rows = [ask({"type": "image", "image": name}) for name in names]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_image(tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(b"no image")
    files = tuple(list_files(str(tmp_path / "d.jsonl"), key="data.train_path"))
    settings = TransformSettings(max_seq_len=100)

    def run(*, is_silent: bool = True) -> tuple[int, list[int]]:
        bad: list[BadRecord] = []
        request = PrepareRequest(
            files, settings, tmp_path / "cache", silent_exception=is_silent, max_bad_fraction=1.0
        )
        tokenizer = MEDIA.processor.tokenizer
        info = prepare(request, tokenizer, media=MEDIA, on_bad=bad.extend)
        return len(open_prepared(info["path"], files=info["files"]).lengths), [o.row for o in bad]

    assert run() == (1, [2, 3])
    written = (tmp_path / "cache").stat().st_mtime_ns
    assert run() == (1, [2, 3])
    assert (tmp_path / "cache").stat().st_mtime_ns == written  # found, not prepared anew
    write_image(tmp_path / names[2])
    assert run() == (2, [2])
    with pytest.raises(DataError, match=r"d\.jsonl:2: 1\.png: it is no image"):
        run(is_silent=False)
    write_image(tmp_path / names[1])
    assert run(is_silent=False) == (3, [])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("workers_end")
def test_a_damaged_image_stops_the_run_by_name(dataset: TokenDataset, workers: int):
    with pytest.raises(DataError, match=r"d\.jsonl:3: 2\.png: it is damaged") as caught:
        list(loader(dataset, [], is_silent=False, limit=1.0, workers=workers))
    assert caught.value.row == 3


def test_it_is_left_out_of_its_row_counted_and_told(dataset: TokenDataset):
    bad: list[BadRecord] = []
    batches = list(loader(dataset, bad, is_silent=True, limit=0.5))
    assert [(Path(one.file).name, one.row) for one in bad] == [("d.jsonl", 3)]
    seen = sorted(origin.row for batch in batches for origin in batch.origins)
    assert seen == [1, 2, 4, 5, 6]
    for batch in batches:
        assert len(batch.media["image_grid_thw"]) == len(batch.origins)


def test_stamps_say_what_each_rank_has_to_look_at_where_somebody_asked(dataset: TokenDataset):
    loaded = loader(dataset, [], is_silent=True, limit=0.5)
    assert all(batch.stamp.grids is None for batch in loaded if batch.stamp)
    loaded.gather_grids = lambda own: [own, [{}] * len(own)]  # the other rank has none
    for batch in loaded:
        assert batch.stamp is not None
        grids = [tuple(grid) for grid in batch.media["image_grid_thw"].tolist()]
        assert batch.stamp.grids == {"image": [tuple(grids), ()]}
    loaded.gather_grids = lambda own: [[{}] * len(own)] * 2
    assert all(batch.stamp.grids == {} for batch in loaded if batch.stamp)


def test_too_many_of_them_stop_the_run(dataset: TokenDataset):
    with pytest.raises(DataError, match="1 of 6 records are bad, more than"):
        list(loader(dataset, [], is_silent=True, limit=0.1))


def evaluate(dataset: TokenDataset, agreed: list[BaseException | None], **options) -> Iterator:
    return iter(
        EvalLoader(
            dataset,
            budget=120,
            layout=WindowLayout(),
            workers=WorkerSettings(),
            settings=CollateSettings(media=MEDIA, **options),
            agree=agreed.append,
        )
    )


def test_evaluation_tells_the_other_ranks_before_it_stops(dataset: TokenDataset):
    agreed: list[BaseException | None] = []
    with pytest.raises(DataError, match=r"2\.png: it is damaged"):
        list(evaluate(dataset, agreed))
    assert [error is None for error in agreed][-1] is False
    agreed.clear()
    rows = [o.row for batch in evaluate(dataset, agreed, is_silent=True) for o in batch.origins]
    assert rows == [1, 2, 4, 5, 6]
    assert agreed
    assert not any(agreed)
