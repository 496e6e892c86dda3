"""Prepare the data of a configuration and measure it, whatever is wrong with single records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from omnilit.cli.fitting import read_config
from omnilit.config.class_rules import NUMBER
from omnilit.config.data import micro_batch_tokens
from omnilit.config.media import read_media_config
from omnilit.config.view import View
from omnilit.data.batches import WorkerSettings
from omnilit.data.cache import TokenDataset, open_prepared
from omnilit.data.evaluation import BUFFER_SIZE
from omnilit.data.media.processor import MediaProcessor, check_hearing, find_processor
from omnilit.data.mixing import MixedSamples, MixOrder
from omnilit.data.multisource import Mixture, SourceSpec
from omnilit.data.packing import PassPlan, PlanSettings, first_fit_buffered
from omnilit.data.planned import PlannedItems
from omnilit.data.prepare import PreparedInfo, PrepareRequest, prepare, read_bad
from omnilit.data.quarantine import BadRecord
from omnilit.data.readers import parse_row, read_rows
from omnilit.data.transforms import DiffusionCheck, Transform, TransformSettings, build_transform
from omnilit.data.warmup import BudgetSchedule
from omnilit.errors import ConfigError, DataError
from omnilit.models.build import check_tokenizer, load_model_config, load_tokenizer
from omnilit.models.class_labels import class_names
from omnilit.modules.data_requests import find_mixture, prepare_requests, read_text_keys
from omnilit.modules.datamodule import check_positions
from omnilit.tools.data_media import count_media, find_damaged
from omnilit.tools.data_report import MAX_LISTED, Ints, Packing, PartReport, PassShare, SourceData
from omnilit.tools.data_view import ShownSample, describe_sample, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING: Final = np.zeros(0, np.int64)
SEES: Final = "model.encoder_data_balance"  # a field of tasks that take media, and of no other
KEYS: Final = {"train": "data.train_path", "eval": "data.eval_path"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is to be shown.

    Args:
        parts: Training data, and evaluation data where it is given.
        samples: Of the training data.
    """

    parts: tuple[PartReport, ...]
    samples: tuple[ShownSample, ...] = ()


@dataclass(frozen=True, slots=True)
class _Source:
    """A source with its numbers; without a data set where it cannot be prepared."""

    data: SourceData
    dataset: TokenDataset | None = None
    bad: tuple[BadRecord, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    report: PartReport
    datasets: Sequence[TokenDataset] = field(default=())


class _Packed(NamedTuple):
    packing: Packing | None = None
    shares: tuple[PassShare, ...] = ()
    notes: tuple[str, ...] = ()


def load_data(view: View, *, num_shown: int = 0, is_decoded: bool = False) -> Loaded:
    """Prepare and measure the data that a checked configuration names.

    Bad records are left out, counted and listed, whatever `data.silent_exception` says.

    Args:
        view: The values, from `make_data_view`.
        num_shown: Samples of the training data to decode, spread evenly over it.
        is_decoded: Decode all images, videos and sounds, to find those that are damaged.

    Raises:
        ConfigError: The data, the tokenizer or the template cannot be found or used.
        DataError: A file cannot be read.
    """
    tokenizer, media = load_view_tokenizer(view), load_view_media(view)
    parts = [_load_part(view, name, tokenizer, media) for name, key in KEYS.items() if view[key]]
    if is_decoded and media is not None:
        parts = [_find_damaged(part, media) for part in parts]
    samples: list[ShownSample] = []
    if num_shown and tokenizer is not None:
        samples = _decode_samples(parts[0].datasets, num_shown, tokenizer, view, media)
    return Loaded(tuple(part.report for part in parts), tuple(samples))


def load_view_tokenizer(view: View) -> PreTrainedTokenizerBase | None:
    """The model's, with the checks of a run; None for records that are not tokenised.

    Raises:
        ConfigError: It cannot be found, or does not fit the model.
    """
    if view["data.data_type"] == "diffusion" and view["data.transform"] is None:
        return None
    config_path, model_path = view["model.config_path"], view["model.model_path"]
    is_trusted = view["model.trust_remote_code"]
    tokenizer = load_tokenizer(_tokenizer_folder(view), trust_remote_code=is_trusted)
    if config_path or model_path:
        config = load_model_config(config_path, model_path, trust_remote_code=is_trusted)
        check_tokenizer(tokenizer, config)
        check_positions(view["data.max_seq_len"], config, is_loud=True)
    return tokenizer


def load_view_media(view: View) -> MediaProcessor | None:
    """The model's processor, with the checks of a run; None of a task that takes text alone.

    Raises:
        ConfigError: It cannot be loaded.
    """
    if SEES not in view:
        return None
    folder, is_trusted = _tokenizer_folder(view), view["model.trust_remote_code"]
    processor = find_processor(folder, trust_remote_code=is_trusted)
    if processor is None:
        return None
    media = MediaProcessor(processor, read_media_config(view["data.mm_configs"]))
    check_hearing(media)
    return media


def _tokenizer_folder(view: View) -> str:
    paths = (view[f"model.{name}_path"] for name in ("tokenizer", "config", "model"))
    path = next((path for path in paths if path), None)
    if path is None:
        raise ConfigError(
            key="model.tokenizer_path",
            problem="neither tokenizer_path, config_path nor model_path is given",
            fix="give the folder of the tokenizer",
        )
    return str(Path(path).parent if Path(path).expanduser().is_file() else path)


def list_requests(view: View, name: str) -> tuple[Mixture | None, list[PrepareRequest]]:
    """What to prepare of the training or the evaluation data.

    Args:
        view: The values, from `make_data_view`.
        name: `train` or `eval`.

    Returns:
        The mixture, where the data is one, and a request for each source.

    Raises:
        ConfigError: A source that does not exist or holds no data.
    """
    key = KEYS[name]
    path = view[key]
    mixture = find_mixture(path, key=key)
    own_name = view["data.source_name"] if name == "train" else None
    specs = mixture.sources if mixture else (SourceSpec(own_name or name, path),)
    return mixture, prepare_requests(
        specs,
        _transform_settings(view),
        key=key,
        mixture_file=path if mixture else None,
        datasets_type=view["data.datasets_type"],
        silent_exception=view["data.silent_exception"],
        max_bad_fraction=1.0,  # the verb tells of all of them before it judges
    )


def prepare_or_skip(
    request: PrepareRequest,
    tokenizer: PreTrainedTokenizerBase,
    media: MediaProcessor | None = None,
) -> PreparedInfo:
    """`prepare` as `fit` would, so that it finds the tokens; with bad records left out if need be.

    Raises:
        DataError: Nothing is left.
    """
    if not request.silent_exception:
        try:
            return prepare(request, tokenizer, media=media)
        except DataError:  # what is wrong is told of every record, not of the first one
            pass
    patient = replace(request, silent_exception=True, max_bad_fraction=1.0)
    return prepare(patient, tokenizer, media=media)


def scan_bad(
    request: PrepareRequest, transform: Transform
) -> tuple[int, int, tuple[BadRecord, ...]]:
    """Look for bad records without keeping any other.

    Returns:
        Number of records, number of bad ones, and the first of these.
    """
    num_records = num_bad = 0
    first: list[BadRecord] = []
    rows = chain.from_iterable(((file, raw) for raw in read_rows(file)) for file in request.files)
    for file, raw in rows:
        num_records += 1
        try:
            transform.encode([parse_row(raw, file=file.path, source=request.source)])
        except DataError as error:
            num_bad += 1
            if len(first) < MAX_LISTED:
                bad = BadRecord.of(error, source=request.source, file=file.path, row=raw.row)
                first.append(bad)
    return num_records, num_bad, tuple(first)


def _load_part(
    view: View,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    media: MediaProcessor | None,
) -> _Part:
    mixture, requests = list_requests(view, name)
    sources = [_load_source(request, tokenizer, media) for request in requests]
    datasets = [source.dataset for source in sources if source.dataset is not None]
    packed = _Packed()
    if len(datasets) == len(sources):
        packed = _pack(view, name, datasets, mixture)
    report = PartReport(
        name,
        tuple(source.data for source in sources),
        packed.packing,
        packed.shares,
        bad=tuple(chain.from_iterable(source.bad for source in sources))[:MAX_LISTED],
        notes=packed.notes,
        failures=tuple(source.failure for source in sources if source.failure is not None),
    )
    return _Part(report, datasets)


def _find_damaged(part: _Part, media: MediaProcessor) -> _Part:
    found = [bad for dataset in part.datasets for bad in find_damaged(dataset, media)]
    listed = tuple(found[:MAX_LISTED])
    report = replace(part.report, damaged=listed, num_damaged=len(found))
    return replace(part, report=report)


def _transform_settings(view: View) -> TransformSettings:
    return TransformSettings(
        data_type=view["data.data_type"],
        text_keys=read_text_keys(view["data.text_keys"]),
        chat_template=view["data.chat_template"],
        max_seq_len=view["data.max_seq_len"],
        overlong=view["data.overlong"],
        truncation_side=view["data.truncation_side"],
        transform=view["data.transform"],
        classes=_find_classes(view),
    )


def _find_classes(view: View) -> tuple[str, ...] | None:
    """The names of the model's classes, as `fit` knows them; None where nothing says them."""
    if NUMBER not in view or not (view["model.config_path"] or view["model.model_path"]):
        return None
    try:
        return class_names(read_config(view))
    except ConfigError as error:
        if any(problem.key != NUMBER for problem in error.problems):
            raise
        return None  # neither names nor number are given: then any number is a class


def _load_source(
    request: PrepareRequest,
    tokenizer: PreTrainedTokenizerBase | None,
    media: MediaProcessor | None,
) -> _Source:
    if tokenizer is None:
        return _scan_source(request, DiffusionCheck())
    try:
        info = prepare_or_skip(request, tokenizer, media)
    except DataError as error:
        source = _scan_source(request, build_transform(request.transform, tokenizer, media))
        return replace(source, failure=str(error))
    dataset = open_prepared(info["path"], request.source, info["files"])
    kind = request.transform.data_type
    data = SourceData(
        request.source,
        dataset.lengths.astype(np.int64),
        dataset.num_targets.astype(np.int64),
        dataset.column("digest"),
        num_records=info["num_records"],
        num_truncated=info["num_truncated"],
        num_cut=info["num_cut"],
        num_dropped=info["num_dropped"],
        num_unsupervised=info["num_unsupervised"],
        num_bad=info["num_bad"],
        labels=_read_labels(dataset) if kind == "classification" else None,
        pair_starts=dataset.column("pair_start").astype(np.int64) if kind == "dpo" else None,
        media=() if media is None else count_media(dataset, media),
    )
    return _Source(data, dataset, tuple(islice(read_bad(info), MAX_LISTED)))


def _scan_source(request: PrepareRequest, transform: Transform) -> _Source:
    num_records, num_bad, first = scan_bad(request, transform)
    data = SourceData(request.source, NOTHING, NOTHING, NOTHING, num_records, num_bad=num_bad)
    return _Source(data, bad=first)


def _read_labels(dataset: TokenDataset) -> Ints:
    """The class of each sample; the cache has no extra label where it equals the last token."""
    labels = dataset.column("label").astype(np.int64)
    for index in np.flatnonzero(labels == -1).tolist():
        labels[index] = dataset[index].labels[-1]
    return labels


def _pack(
    view: View, name: str, datasets: Sequence[TokenDataset], mixture: Mixture | None
) -> _Packed:
    """How full micro-batches are: the first pass of training, or the evaluation."""
    sizes = view["train.micro_batch_size"], view["data.max_seq_len"]
    budget = micro_batch_tokens(*sizes, view["data.data_type"])
    if name == "eval":
        lengths = datasets[0].lengths
        if int(lengths.max()) > budget:
            return _Packed()
        order = np.arange(len(lengths))
        plan = first_fit_buffered(lengths, order, budget=budget, buffer_size=BUFFER_SIZE)
        return _Packed(_measure(plan, lengths.astype(np.int64), budget, "first fit, in order"))
    samples = MixedSamples(datasets, [dataset.source for dataset in datasets])
    seed = view["train.seed"]
    order = mixture and MixOrder.of(mixture, [d.lengths for d in datasets], seed=seed)
    settings, way = _plan_settings(view, budget)
    try:
        items = PlannedItems(
            samples, settings, workers=WorkerSettings(), fingerprint="", order=order
        )
    except ConfigError as error:  # pairs that are longer than a micro-batch
        return _Packed(notes=(str(error),))
    lengths, plan = samples.lengths.astype(np.int64), items.plan(0)
    used = budget if settings.samples_per_item is None else None
    shares = _measure_shares(plan, datasets) if mixture else ()
    return _Packed(_measure(plan, lengths, used, way), shares, _notes(view))


def _plan_settings(view: View, budget: int) -> tuple[PlanSettings, str]:
    """The plan of `fit` after its warm-up, and what it is called."""
    micro_batch_size, buffer_size = view["train.micro_batch_size"], None
    full = BudgetSchedule(budget)
    if not view["train.dyn_bsz"]:
        settings = PlanSettings(view["train.seed"], full, samples_per_item=micro_batch_size)
        return settings, f"{micro_batch_size} samples each, dyn_bsz is off"
    is_stream = view["data.datasets_type"] == "iterable"
    if is_stream or view.is_given("data.dyn_bsz_buffer_size"):
        buffer_size = view["data.dyn_bsz_buffer_size"]
    way = f"first fit from {buffer_size} samples" if buffer_size else "best fit over the pass"
    return PlanSettings(view["train.seed"], full, buffer_size), way


def _measure(plan: PassPlan, lengths: Ints, budget: int | None, way: str) -> Packing:
    return Packing(plan.size, int(lengths[plan.samples].sum()), budget, way)


def _measure_shares(plan: PassPlan, datasets: Sequence[TokenDataset]) -> tuple[PassShare, ...]:
    ends = np.cumsum([len(dataset) for dataset in datasets])
    source_of = np.searchsorted(ends, plan.samples, side="right")
    lengths = np.concatenate([dataset.lengths for dataset in datasets])[plan.samples]
    return tuple(
        PassShare(dataset.source, int((source_of == i).sum()), int(lengths[source_of == i].sum()))
        for i, dataset in enumerate(datasets)
    )


def _notes(view: View) -> tuple[str, ...]:
    notes = []
    if view["data.datasets_type"] == "iterable":
        notes.append(
            "the data was read once and measured as a whole; datasets_type: iterable streams it "
            "in shards, whose packing differs a little"
        )
    if view["train.bsz_warmup_ratio"]:
        notes.append("packing is measured at the full budget, after the warm-up")
    return tuple(notes)


def _decode_samples(
    datasets: Sequence[TokenDataset],
    num_shown: int,
    tokenizer: PreTrainedTokenizerBase,
    view: View,
    media: MediaProcessor | None,
) -> list[ShownSample]:
    if not datasets:
        return []
    samples = MixedSamples(datasets, [dataset.source for dataset in datasets])
    has_class = view["data.data_type"] == "classification"
    return [
        describe_sample(index + 1, samples[index], tokenizer, has_class=has_class, media=media)
        for index in spread(num_shown, len(samples.lengths))
    ]
