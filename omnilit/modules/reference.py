"""Log-probabilities of a reference model, computed once before training and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig

from omnilit.data.cache import TokenDataset
from omnilit.data.evaluation import EvalLoader
from omnilit.data.pair_scores import KEY, PairScoreTable, is_saved
from omnilit.errors import ConfigError, DataError
from omnilit.logging import get_logger
from omnilit.losses.preference import PairScores
from omnilit.losses.segments import sum_dtype
from omnilit.modules.data_requests import cache_dir
from omnilit.parallel.collectives import gather_objects, run_on_first
from omnilit.types import MicroBatch

log = get_logger(__name__)
FORMAT: Final = 1  # a part of every key: raise it when what is computed changes
UNNAMED: Final = ("_name_or_path", "transformers_version")  # of a configuration; change no number
Score = Callable[[MicroBatch], PairScores | None]


class PairData(Protocol):
    """The side of the data module that scores are made from."""

    def prepared(self) -> list[TokenDataset]:
        """All prepared data that the run reads; there once `setup` has run."""
        ...

    def score_loader(self, dataset: TokenDataset) -> EvalLoader:
        """Every pair of some prepared data once, dealt to the ranks."""
        ...


class StoredReference:
    """What a reference model says of all pairs that a run reads.

    Args:
        data: The pairs.
        parts: All that the numbers depend on beside the pairs.

    Attributes:
        lacking: Prepared data whose pairs have no numbers yet.
    """

    def __init__(self, data: PairData, parts: Mapping[str, object]) -> None:
        self._data = data
        self._tables: list[PairScoreTable] = []
        self._folders: dict[Path, Path] = {}
        root = cache_dir().parent / "reference"
        datasets = data.prepared()
        for dataset in datasets:
            own = {"format": FORMAT, "data": dataset.path.name, **parts}
            text = json.dumps(own, sort_keys=True)
            digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            self._folders[dataset.path] = root / digest
        found = run_on_first(
            lambda: [is_saved(self._folders[dataset.path]) for dataset in datasets],
            name="reference/find",
        )
        self.lacking = [d for d, is_there in zip(datasets, found, strict=True) if not is_there]
        for dataset, is_there in zip(datasets, found, strict=True):
            if is_there:
                table = PairScoreTable(dataset)
                table.load(self._folders[dataset.path])
                self._tables.append(table)
                log.info("reference: log-probabilities of %s were there", dataset.source)

    def compute(self, score: Score, place: Callable[[MicroBatch], MicroBatch]) -> None:
        """Score what is lacking and keep it; every rank calls.

        Args:
            score: Of a micro-batch on the device; None where another rank has the scores.
            place: Puts this rank's part of a micro-batch on its device.
        """
        for dataset in self.lacking:
            table = PairScoreTable(dataset)
            batches = map(place, self._data.score_loader(dataset))
            for rows, values in gather_objects(_score_all(table, batches, score)):
                table.values[rows] = values
            folder = self._folders[dataset.path]
            run_on_first(lambda t=table, f=folder: t.save(f), name="reference/save")
            self._tables.append(table)
            log.info("reference: %d pairs of %s scored", len(table.values), dataset.source)
        self.lacking = []

    def of_batch(self, batch: MicroBatch) -> PairScores:
        """The numbers of a micro-batch's pairs.

        Raises:
            DataError: A pair is none of the prepared data's.
        """
        origins = batch.origins[::2]  # both answers of a pair are of one record
        values = np.empty((len(origins), 2), np.float64)
        for index, origin in enumerate(origins):
            found = ((one, one.find(origin)) for one in self._tables)
            table, row = next((pair for pair in found if pair[1] is not None), (None, None))
            if table is None:
                raise DataError(
                    problem="this pair was not there when the reference model was asked",
                    fix=f"leave {KEY} out, or let data.collator keep the origins of its samples",
                    file=origin.file,
                    row=origin.row,
                )
            values[index] = table.values[row]
        device = batch.input_ids.device
        scores = torch.from_numpy(values).to(device, sum_dtype(device))
        return PairScores(scores[:, 0], scores[:, 1])


def _score_all(
    table: PairScoreTable, batches: Iterable[MicroBatch], score: Score
) -> tuple[np.ndarray, np.ndarray]:
    """This rank's share: which rows of the table, and their numbers."""
    rows: list[int] = []
    values = [np.zeros((0, 2), np.float64)]
    for batch in batches:
        found = score(batch)
        if found is not None:
            own = [table.find(origin) for origin in batch.origins[::2]]
            rows += [row for row in own if row is not None]
            values.append(torch.stack([found.chosen, found.rejected], dim=1).cpu().numpy())
    return np.asarray(rows, np.int64), np.concatenate(values)


def describe_weights(
    config: PretrainedConfig, model_path: str | None, *, seed: int | None
) -> dict[str, object]:
    """What tells a model's weights from others: contents of files, or the seed they are drawn by.

    Args:
        config: Of the model.
        model_path: Folder of its weights; None for random ones.
        seed: Of random weights; None where there are none.
    """
    settings = {k: v for k, v in config.to_dict().items() if k not in UNNAMED}
    files: list[list[str]] = []
    if model_path is not None:
        files = run_on_first(lambda: _hash_files(Path(model_path)), name="reference/weights")
    text = json.dumps(settings, sort_keys=True, default=str)
    return {"config": text, "files": files, "seed": seed}


def _hash_files(folder: Path) -> list[list[str]]:
    found: list[list[str]] = []
    for path in sorted(folder.expanduser().glob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        found.append([path.name, digest.hexdigest()])
    return found


def pair_data_of(data: object) -> PairData:
    """The data module as what scores are made from.

    Raises:
        ConfigError: It is another one than ours, and does not know what it prepared.
    """
    if all(callable(getattr(data, name, None)) for name in ("prepared", "score_loader")):
        return data  # pyright: ignore[reportReturnType]
    raise ConfigError(
        key=KEY,
        problem=f"{type(data).__name__} does not say which pairs there are",
        fix="use OmniDataModule, or leave it out",
    )
