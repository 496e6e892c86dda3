"""What is said of weights that do not match their model by name and shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from omnilit.errors import ConfigError, Problem
from omnilit.logging import get_logger

KEY = "model.model_path"
MAX_LISTED = 8
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where files and model differ.

    Args:
        missing: Names that the files lack.
        unexpected: Names that the model has no place for.
        shapes: Name, shape in the files and shape in the model.
        untied: Names that the model ties to another, and whose values in the files differ.
    """

    missing: Iterable[str] = ()
    unexpected: Iterable[str] = ()
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]] = field(default=())
    untied: Iterable[str] = ()

    @property
    def absent(self) -> set[str]:
        """Names that the files give no usable value."""
        return set(self.missing) | {name for name, *_ in self.shapes}

    def texts(self) -> list[str]:
        """One sentence part for each kind, after the words "the files of PATH"."""
        other = {f"{n} {list(found)} instead of {list(own)}" for n, found, own in self.shapes}
        without_shape = set(self.missing) - {name for name, *_ in self.shapes}
        return [
            *_describe("lack", without_shape),
            *_describe("hold, without a place in the model,", self.unexpected),
            *_describe("hold in another shape", other),
            *_describe("hold, differing from the weight that the model ties it to,", self.untied),
        ]


def judge(model_path: str, mismatch: Mismatch, *, strict: bool) -> None:
    """Refuse files that do not match, or say in the log in what.

    Args:
        model_path: Where they are.
        mismatch: Where they differ from the model.
        strict: Whether every name must be found and none be left over.

    Raises:
        ConfigError: Something differs and `strict` is set, or ties differ.
    """
    problems = mismatch.texts()
    if problems and (strict or list(mismatch.untied)):
        raise ConfigError.of(
            Problem(
                KEY,
                f"the files of {model_path} {text}",
                "give the weights that belong to model.config_path, or set model.strict: false "
                "to start what is missing at random and leave out the rest",
            )
            for text in problems
        )
    for text in problems:
        log.warning("%s: the files of %s %s", KEY, model_path, text)
    if mismatch.absent:
        log.warning("%s: %s start at random", KEY, listed(sorted(mismatch.absent)))


def unreadable(model_path: str, error: BaseException) -> ConfigError:
    """What to raise where the files cannot be read at all."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ConfigError(
        key=KEY,
        problem=f"no weights can be loaded from {model_path} ({first})",
        fix="give a folder with config.json and model.safetensors (or its shards and index), "
        "or leave model_path out to start at random",
    )


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    count = f"{len(names)} tensors: " if len(names) > 1 else ""
    return f"{count}{', '.join(names[:MAX_LISTED])}{more}"


def _describe(verb: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{verb} {listed(found)}"] if found else []
