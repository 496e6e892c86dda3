"""From prepared sources to the loaders of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from omnilit.config import DataloaderConfig, TrainingArguments
from omnilit.data.batches import WorkerSettings
from omnilit.data.cache import TokenDataset
from omnilit.data.collate import CollateSettings, Collator
from omnilit.data.epochs import EpochLength
from omnilit.data.evaluation import EvalLoader
from omnilit.data.items import ItemStream, WindowLayout
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.mixing import MixedSamples, MixOrder
from omnilit.data.packing import PlanSettings
from omnilit.data.planned import PlannedItems
from omnilit.data.prepare import PrepareRequest, cache_key
from omnilit.data.streams.state import StreamSettings
from omnilit.data.streams.stream import StreamData, StreamedItems, count_shards
from omnilit.data.transforms import CLASSIFICATION, build_transform
from omnilit.data.warmup import BudgetSchedule
from omnilit.data.window import TrainLoader
from omnilit.modules.preparation import Preparation
from omnilit.parallel.collectives import gather_objects, sum_or_raise
from omnilit.parallel.mesh import Topology


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """What the loaders of a run depend on beside the sources and the mesh.

    Args:
        train: Batch sizes, limits and the seed.
        dataloader: Worker processes.
        budget: Tokens of a micro-batch.
        epoch_size: Tokens of an epoch, or its samples without `dyn_bsz`; None for one pass.
        buffer_size: Samples that packing of streamed data chooses from.
        is_buffer_size_given: Prepared data chooses from as many, too, not from the whole pass.
        collator: The user's own; None for `collate`.
    """

    train: TrainingArguments
    dataloader: DataloaderConfig
    budget: int
    epoch_size: int | None
    buffer_size: int
    is_buffer_size_given: bool
    collator: Collator | None


@dataclass(frozen=True, slots=True)
class LoaderFactory:
    """Makes the loaders of one rank.

    Args:
        settings: Sizes, limits, workers.
        preparation: The sources.
        topology: This rank's place among those that read data.
        tokenizer: The model's.
        media: Of a model that takes images, videos or sounds.
        tells_grids: Data ranks look at images and videos of each other's rows.
    """

    settings: LoaderSettings
    preparation: Preparation
    topology: Topology
    tokenizer: PreTrainedTokenizerBase
    media: MediaProcessor | None = None
    tells_grids: bool = False

    def train_loader(self, accumulation: int) -> TrainLoader:
        """The loader of windows of `accumulation` micro-batches.

        Raises:
            DataError: A record cannot be used; on all ranks.
            ConfigError: The sources or sizes cannot be used.
        """
        given = self.settings
        topology, train = self.topology, given.train
        layout = WindowLayout(topology.data_rank, topology.data_size, accumulation)
        is_streamed = self.preparation.datasets_type == "iterable"
        open_items = self._streamed if is_streamed else self._planned
        ratio, gather = train.bsz_warmup_ratio, None
        if self.tells_grids and topology.data_size > 1:
            gather = partial(gather_objects, group=topology.data.get_group())
        loader = TrainLoader(
            open_items(layout, BudgetSchedule(given.budget)),
            layout=layout,
            epochs=EpochLength(given.epoch_size, train.max_steps, ratio),
            reduce_counts=CountReducer(topology),
            gather_grids=gather,
        )
        if ratio:
            steps = int(loader.count_windows(train.num_train_epochs) * ratio)
            init = train.bsz_warmup_init_mbtoken
            warming = BudgetSchedule(given.budget, init, steps, layout.num_items)
            loader.items = open_items(layout, warming)
        return loader

    def eval_loader(self) -> EvalLoader:
        """The loader of the data to evaluate on; raises as `train_loader` does."""
        (dataset,) = self.preparation.prepare("eval", self.tokenizer, self.media)
        return self.loader_of(dataset)

    def loader_of(self, dataset: TokenDataset) -> EvalLoader:
        """A loader of every sample of prepared data once."""
        return EvalLoader(
            dataset,
            budget=self.settings.budget,
            layout=WindowLayout(self.topology.data_rank, self.topology.data_size, 1),
            workers=self._workers,
            settings=self._collate(has_weights=dataset.has_weights),
            skipping=self.preparation.skipping,
            agree=self._agree,
        )

    def _agree(self, error: BaseException | None) -> None:
        sum_or_raise({}, error, device=self.topology.device)

    def _planned(self, layout: WindowLayout, budget: BudgetSchedule) -> ItemStream:
        """Items of data that was tokenised before."""
        given, mixture = self.settings, self.preparation.mixture
        datasets = self.preparation.prepare("train", self.tokenizer, self.media)
        train = given.train
        settings = PlanSettings(
            train.seed,
            budget,
            given.buffer_size if given.is_buffer_size_given else None,
            None if train.dyn_bsz else train.micro_batch_size,
            drop_last=not train.dyn_bsz and given.dataloader.drop_last,
        )
        data, order = datasets[0], None
        if mixture is not None:
            data = MixedSamples(datasets, mixture.names)
            order = MixOrder.of(mixture, [d.lengths for d in datasets], seed=train.seed)
        keys = [dataset.path.name for dataset in datasets]
        if self.media is not None:  # the same records may have been bad at another time
            keys += [str(len(dataset.lengths)) for dataset in datasets]
        has_weights = any(dataset.has_weights for dataset in datasets)
        return PlannedItems(
            data,
            settings,
            workers=self._workers,
            fingerprint=f"{keys} {order}",
            num_items=layout.num_items,
            collate=self._collate(self.preparation.source_names, has_weights=has_weights),
            order=order,
            skipping=self.preparation.skipping,
        )

    def _streamed(self, layout: WindowLayout, budget: BudgetSchedule) -> ItemStream:
        """Items of data that is tokenised while it is trained on."""
        given, sources = self.settings, self.preparation
        transform = build_transform(sources.transform, self.tokenizer, self.media)
        train = given.train
        files = tuple(request.files for request in sources.requests("train"))
        nothing_read = PrepareRequest((), sources.transform, Path())
        settings = StreamSettings(
            train.seed,
            budget,
            count_shards(files),
            given.buffer_size,
            None if train.dyn_bsz else train.micro_batch_size,
            drop_last=not train.dyn_bsz and given.dataloader.drop_last,
            is_silent=sources.silent_exception,
        )
        key = cache_key(nothing_read, transform, self.tokenizer, self.media)
        # weights may come with any record
        has_weights = sources.transform.data_type in ("conversation", "dpo")
        has_weights |= sources.transform.transform is not None
        return StreamedItems(
            StreamData(sources.sources, files, transform, key),
            settings,
            workers=self._workers,
            collate=self._collate(sources.source_names, has_weights=has_weights),
            max_bad_fraction=sources.max_bad_fraction,
            on_bad=sources.on_bad,
        )

    def _collate(self, sources: tuple[str, ...] = (), *, has_weights: bool) -> CollateSettings:
        given = self.settings
        # in a pipeline all micro-batches are of one shape
        is_filled = given.train.pad_to_length or self.topology.stages is not None
        return CollateSettings(
            pad_to=given.budget if is_filled else None,
            sources=sources,
            has_weights=has_weights,
            collator=given.collator,
            has_pairs=self.preparation.transform.data_type == "dpo",
            has_classes=self.preparation.transform.data_type == CLASSIFICATION,
            media=self.media,
            is_silent=self.preparation.silent_exception,
        )

    @property
    def _workers(self) -> WorkerSettings:
        return choose_workers(self.settings.dataloader, self.topology.device)


def choose_workers(config: DataloaderConfig, device: torch.device) -> WorkerSettings:
    """Worker processes as configured; their batches are pinned where an accelerator takes them."""
    is_pinned = config.pin_memory and device.type != "cpu"
    return WorkerSettings(config.num_workers, config.prefetch_factor, is_pinned)


class CountReducer:
    """Sums a window's counts over the data ranks, or raises on every rank of the run.

    Ranks that read the same data count it once; an error of any of them stops them all.

    Args:
        topology: Says which ranks read the same data.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def __call__(
        self, counts: Mapping[str, float], error: BaseException | None
    ) -> Mapping[str, float]:
        """The sums; see `sum_or_raise`."""
        topology = self._topology
        if not topology.is_first_of_data:
            counts = dict.fromkeys(counts, 0.0)
        return sum_or_raise(counts, error, device=topology.device)
