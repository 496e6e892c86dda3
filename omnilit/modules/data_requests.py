"""From the `data` group of a configuration to what is prepared: for runs and for `omnilit data`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from omnilit.data.files import DataFile, list_files
from omnilit.data.multisource import Mixture, SourceSpec, is_mixture, read_mixture
from omnilit.data.prepare import PrepareRequest
from omnilit.data.transforms import CLASSIFICATION, TransformSettings
from omnilit.errors import ConfigError, Problem
from omnilit.models.class_labels import class_names


def find_mixture(path: str, *, key: str) -> Mixture | None:
    """The mixture that a YAML file of several sources describes; None where `path` is data.

    Only `data.train_path` can name one.

    Raises:
        ConfigError: Everything that is wrong with the file.
    """
    if key != "data.train_path" or not is_mixture(path):
        return None
    return read_mixture(path, key=key)


def prepare_requests(
    sources: Sequence[SourceSpec],
    transform: TransformSettings,
    *,
    key: str,
    mixture_file: str | None = None,
    datasets_type: str = "mapping",
    silent_exception: bool = False,
    max_bad_fraction: float = 0.01,
) -> list[PrepareRequest]:
    """What to prepare of each source.

    Args:
        sources: Those of a mixture, or the one there is.
        transform: How records become samples.
        key: The YAML path that names the data, for messages.
        mixture_file: The YAML file that lists the sources, likewise; None where there is one.
        datasets_type: `mapping`, `iterable`, or a reader of the user's own.
        silent_exception: Skip bad records.
        max_bad_fraction: Share of them that stops all the same.

    Raises:
        ConfigError: Every source that does not exist or holds no data.
    """
    folder = cache_dir()
    found: list[tuple[DataFile, ...]] = []
    problems: list[Problem] = []
    for index, source in enumerate(sources):
        place = f"{key}: {mixture_file}: sources[{index}]" if mixture_file else key
        try:
            found.append(tuple(list_files(source.path, key=place, datasets_type=datasets_type)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError.of(problems)
    return [
        PrepareRequest(
            files,
            transform,
            folder,
            source=source.name,
            silent_exception=silent_exception,
            max_bad_fraction=max_bad_fraction,
        )
        for source, files in zip(sources, found, strict=True)
    ]


def read_text_keys(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """`data.text_keys`, one name or several, as `TransformSettings` takes it."""
    if given is None:
        return None
    return (given,) if isinstance(given, str) else tuple(given)


def settle_classes(transform: TransformSettings, config: PretrainedConfig) -> TransformSettings:
    """The same settings with the names of the model's classes, which every label must be one of.

    Raises:
        ConfigError: The data has classes and the model none, or the reverse.
    """
    names = class_names(config)
    if (names is None) == (transform.data_type == CLASSIFICATION):
        raise ConfigError(
            key="data.data_type",
            problem=f"{transform.data_type} does not go with the model, which has "
            f"{'no' if names is None else len(names)} classes to tell apart",
            fix=f"train ClassificationModule on data_type: {CLASSIFICATION}, and nothing else",
        )
    return replace(transform, classes=names)


def cache_dir() -> Path:
    """Where tokenised data is kept: $OMNILIT_CACHE, else the user's cache folder."""
    own = os.environ.get("OMNILIT_CACHE")
    if own:
        return Path(own).expanduser() / "data"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "omnilit" / "data"
