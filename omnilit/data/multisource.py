"""Several sources of data in one run: the YAML file that names them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import yaml

from omnilit.errors import ConfigError, Problem, suggest
from omnilit.logging import get_logger

log = get_logger(__name__)

Level = Literal["sample", "token"]
Stopping = Literal["first_exhausted", "all_exhausted", "never_exhausted"]
LEVELS: Final = ("sample", "token")
STOPPING: Final = ("first_exhausted", "all_exhausted", "never_exhausted")
KEYS: Final = (
    "sources", "names", "schedule", "level", "stopping_strategy", "upstream_sharded",
    "source_names",
)  # fmt: skip


class SourceSpec(NamedTuple):
    """One source.

    Args:
        name: In metrics and origins.
        path: What `data.train_path` could be.
        weight: Its share; the weights of all sources add up to 1.
    """

    name: str
    path: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Mixture:
    """How sources are mixed.

    Args:
        sources: At least one.
        level: Whether weights are shares of the samples or of the tokens.
        stopping: When a pass is over.
    """

    sources: tuple[SourceSpec, ...]
    level: Level = "sample"
    stopping: Stopping = "first_exhausted"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in order."""
        return tuple(source.name for source in self.sources)


def is_mixture(path: str) -> bool:
    """Whether a path names a file of several sources rather than data."""
    return path.endswith((".yaml", ".yml"))


def read_mixture(path: str, *, key: str) -> Mixture:
    """The mixture that a YAML file describes.

    Paths of sources are relative to the working directory, as `data.train_path` itself is.
    `upstream_sharded` of the reference may be given and means nothing: records are dealt to
    ranks here, whatever was done to the files before.

    Args:
        path: The file.
        key: The YAML path that `path` was given under, for messages.

    Raises:
        ConfigError: Everything that is wrong with the file.
    """
    where = f"{key}: {path}"
    fields = _read_fields(path, where)
    problems = [
        Problem(
            f"{where}: {name}",
            f"unknown key{f'.{hint}' if (hint := suggest(name, KEYS)) else ''}",
            f"use one of {', '.join(KEYS)}",
        )
        for name in map(str, fields)
        if name not in KEYS
    ]
    sources = _strings(fields.get("sources"), f"{where}: sources", problems)
    names = _strings(fields.get("names"), f"{where}: names", problems)
    problems += _check_names(fields, sources, names, where)
    weights = _read_weights(fields.get("schedule"), len(sources), f"{where}: schedule", problems)
    for name, known, default in (
        ("level", LEVELS, "sample"),
        ("stopping_strategy", STOPPING, "first_exhausted"),
    ):
        value = fields.setdefault(name, default)
        if value not in known:
            text = f"use one of {', '.join(known)}"
            problems.append(Problem(f"{where}: {name}", f"{value!r} is not known", text))
    if problems:
        raise ConfigError.of(problems)
    total = math.fsum(weights)
    if not math.isclose(total, 1.0, rel_tol=1e-6):
        log.info("%s: the weights add up to %g and are taken as shares of that", path, total)
    specs = zip(names, sources, weights, strict=True)
    return Mixture(
        tuple(SourceSpec(name, source, weight / total) for name, source, weight in specs),
        fields["level"],
        fields["stopping_strategy"],
    )


def _read_fields(path: str, where: str) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = f"cannot be read ({' '.join(str(error).split())})"
        raise ConfigError(key=where, problem=problem, fix="correct the file") from error
    if not isinstance(fields, dict):
        raise ConfigError(key=where, problem="holds no keys", fix="give at least sources and names")
    return dict(fields)


def _strings(value: object, key: str, problems: list[Problem]) -> list[str]:
    if isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in value):
        return value
    what = "is missing" if value is None else f"is {value!r}"
    problems.append(Problem(key, what, "give a list of at least one text"))
    return []


def _check_names(
    fields: Mapping[str, Any], sources: Sequence[str], names: Sequence[str], where: str
) -> list[Problem]:
    problems = []
    if sources and names and len(sources) != len(names):
        text = f"{len(names)} names for {len(sources)} sources"
        problems.append(Problem(f"{where}: names", text, "give one name a source"))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        text = f"{', '.join(twice)} comes more than once"
        problems.append(Problem(f"{where}: names", text, "give each source a name of its own"))
    if odd := [name for name in names if "/" in name]:
        text = f"{', '.join(odd)} cannot be part of a metric's name"
        problems.append(Problem(f"{where}: names", text, "leave out the /"))
    if fields.get("source_names", list(names)) != list(names):
        text = f"{fields['source_names']!r} are not the names"
        problems.append(Problem(f"{where}: source_names", text, "leave it out"))
    if not isinstance(fields.get("upstream_sharded", True), bool):
        text = f"{fields['upstream_sharded']!r} is not true or false"
        problems.append(Problem(f"{where}: upstream_sharded", text, "leave it out"))
    return problems


def _read_weights(
    schedule: object, num_sources: int, key: str, problems: list[Problem]
) -> list[float]:
    """One weight a source; equal ones where no schedule is given."""
    equal = [1.0 / max(num_sources, 1)] * num_sources
    if schedule is None:
        return equal
    if not (isinstance(schedule, list) and len(schedule) == 1 and isinstance(schedule[0], dict)):
        text = "is not a list of one entry"
        fix = "give [{schedule_type: const, weights: [...]}]; weights that change do not exist"
        problems.append(Problem(key, text, fix))
        return equal
    entry = schedule[0]
    if (kind := entry.get("schedule_type", "const")) != "const":
        text = f"{kind!r} is not known"
        problems.append(Problem(f"{key}[0].schedule_type", text, "use const"))
    if odd := sorted(set(entry) - {"schedule_type", "weights"}):
        text = f"unknown keys {', '.join(map(str, odd))}"
        problems.append(Problem(f"{key}[0]", text, "give schedule_type and weights only"))
    weights = entry.get("weights")
    if not isinstance(weights, list) or not all(map(_is_positive, weights)):
        text = f"{weights!r} is not a list of numbers above 0"
        fix = "give one number a source, and leave out sources that shall give nothing"
        problems.append(Problem(f"{key}[0].weights", text, fix))
        return equal
    if num_sources and len(weights) != num_sources:
        text = f"{len(weights)} weights for {num_sources} sources"
        problems.append(Problem(f"{key}[0].weights", text, "give one weight a source"))
        return equal
    return [float(weight) for weight in weights]


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0
