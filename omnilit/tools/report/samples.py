"""Some samples of the data that runs were trained on, read and tokenised anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Final

from omnilit.checkpoint.layout import MODEL_ASSETS
from omnilit.cli.plan import make_data_view
from omnilit.cli.raw import Command
from omnilit.data.prepare import PrepareRequest
from omnilit.data.readers import parse_row, read_rows
from omnilit.data.transforms import Transform, build_transform
from omnilit.errors import ConfigError, DataError, OmniError
from omnilit.tools.data_load import list_requests, load_view_media, load_view_tokenizer
from omnilit.tools.data_view import ShownSample, describe_sample
from omnilit.tools.report.runs import Run
from omnilit.tools.report.settings import FILE as CONFIG
from omnilit.types import Sample

MAX_ROWS: Final = 100  # of a source that are tried for samples
MODEL_PATHS: Final = ("model.config_path", "model.tokenizer_path")
WEIGHTS_PATH: Final = "model.model_path"
# What decides how records become samples, in a resolved configuration
DATA_SETTINGS: Final = (
    "data.",
    "model.init_args.config_path",
    "model.init_args.model_path",
    "model.init_args.tokenizer_path",
)


@dataclass(frozen=True, slots=True)
class SharedSamples:
    """Samples of runs whose data is the same.

    Args:
        runs: Their names.
        samples: The first of each source.
        problem: Why there are none; None where there are.
    """

    runs: tuple[str, ...]
    samples: tuple[ShownSample, ...] = ()
    problem: str | None = None


def show_samples(runs: Sequence[Run], num_shown: int) -> list[SharedSamples]:
    """Samples of every run, once for those that name the same data.

    Args:
        runs: Read from their folders.
        num_shown: How many of each.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_data_settings(run), []).append(run)
    return [_show_group(group, num_shown) for group in groups.values()]


def _data_settings(run: Run) -> tuple[tuple[str, str], ...]:
    values = run.settings.values.items()
    return tuple((path, value) for path, value in values if path.startswith(DATA_SETTINGS))


def _show_group(group: Sequence[Run], num_shown: int) -> SharedSamples:
    names, first = tuple(run.name for run in group), group[0]
    if first.settings.problem is not None:
        return SharedSamples(names, problem=first.settings.problem)
    try:
        samples = tuple(read_samples(first.folder, num_shown))
    except (OmniError, OSError) as error:  # the data or the tokenizer is gone
        return SharedSamples(names, problem=str(error))
    problem = None if samples else f"the first {MAX_ROWS} records of each source give no sample"
    return SharedSamples(names, samples, problem)


def read_samples(folder: Path, num_shown: int) -> Iterator[ShownSample]:
    """The first samples of the training data that a run's configuration names.

    The tokenizer is the run's own copy, where it has one, since the model may be gone.

    Args:
        folder: Of the run.
        num_shown: How many, shared out over the sources.

    Raises:
        ConfigError: The data, the tokenizer or the template cannot be found or used, or the
            records are not tokenised.
        DataError: A file cannot be read.
    """
    flags = ()
    if (assets := folder / MODEL_ASSETS).is_dir():
        flags = (*((path, (str(assets),)) for path in MODEL_PATHS), (WEIGHTS_PATH, ("null",)))
    view = make_data_view(Command((folder / CONFIG,), flags))
    tokenizer = load_view_tokenizer(view)
    if tokenizer is None:
        raise ConfigError(
            key="data.data_type",
            problem="these records are not tokenised, so there is no text to mark",
            fix="look at the files",
        )
    media, has_class = load_view_media(view), view["data.data_type"] == "classification"
    _, requests = list_requests(view, "train")
    shares = [len(range(i, num_shown, len(requests))) for i in range(len(requests))]
    number = 0
    for request, share in zip(requests, shares, strict=True):
        transform = build_transform(request.transform, tokenizer, media)
        for sample in islice(_encode_rows(request, transform), share):
            number += 1
            yield describe_sample(number, sample, tokenizer, has_class=has_class, media=media)


def _encode_rows(request: PrepareRequest, transform: Transform) -> Iterator[Sample]:
    """The first sample of each of the first records; bad ones and empty ones are passed over."""
    rows = chain.from_iterable(((file, raw) for raw in read_rows(file)) for file in request.files)
    for file, raw in islice(rows, MAX_ROWS):
        try:
            outcome = transform.encode([parse_row(raw, file=file.path, source=request.source)])
        except DataError:  # the run has said so, or has stopped
            continue
        yield from outcome.samples[:1]
