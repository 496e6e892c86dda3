"""The errors a user can cause: what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a setting, ready to be shown beside others.

    Args:
        key: Where it stands, as a YAML path such as `train.optimizer.lr`.
        problem: What is wrong, values included; a final full stop may be left out.
        fix: What to do, as an imperative without a final full stop.
    """

    key: str
    problem: str
    fix: str

    def __str__(self) -> str:
        """Read as one sentence a part: where, what, what to do."""
        stop = "" if self.problem.endswith(("?", ".")) else "."
        return f"{self.key}: {self.problem}{stop} To fix: {self.fix}."


class OmniError(Exception):
    """The base of every error that a user's input can cause."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by state, so that the error crosses from a worker or a rank unharmed."""
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


class ConfigError(OmniError):
    """One or more settings are wrong; raised once a stage, with all its problems.

    Args:
        key: YAML path of the setting.
        problem: What is wrong with it.
        fix: What to do.
    """

    def __init__(self, *, key: str, problem: str, fix: str) -> None:
        self.problems: tuple[Problem, ...] = (Problem(key, problem, fix),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> ConfigError:
        """One error that lists all `problems`, of which there is at least one."""
        found = tuple(problems)
        error = cls(key=found[0].key, problem=found[0].problem, fix=found[0].fix)
        error.problems = found
        error.args = ("\n".join(str(problem) for problem in found),)
        return error


class KernelError(ConfigError):
    """A kernel was asked for that this machine or this model cannot run."""


class RestartError(ConfigError):
    """This process must start again with other variables, which are read at its start only.

    Args:
        key: YAML path of the setting that needs it.
        environment: The variables.
    """

    def __init__(self, *, key: str, environment: dict[str, str]) -> None:
        named = " ".join(f"{name}={value}" for name, value in environment.items())
        super().__init__(
            key=key,
            problem=f"{', '.join(environment)} must be set before Python starts",
            fix=f"start it with {named}",
        )
        self.environment = environment


class DataError(OmniError):
    """A data file or a record in it cannot be used.

    Args:
        problem: What is wrong, without a final full stop.
        fix: What to do, as an imperative without a final full stop.
        file: The data file, where one is known.
        row: Its 1-based line or row, where one is known.
    """

    def __init__(self, *, problem: str, fix: str, file: str = "", row: int | None = None) -> None:
        where = f"{file}:{row}: " if file and row is not None else f"{file}: " if file else ""
        super().__init__(f"{where}{problem}. To fix: {fix}.")
        self.problem, self.fix, self.file, self.row = problem, fix, file, row


class CheckpointError(OmniError):
    """A checkpoint cannot be written, found or read."""


class TrainingError(OmniError):
    """Training cannot go on.

    Args:
        problem: What happened, without a final full stop.
        fix: What to do, as an imperative without a final full stop.
    """

    def __init__(self, *, problem: str, fix: str) -> None:
        super().__init__(f"{problem}. To fix: {fix}.")


def _rebuild(
    kind: type[OmniError], args: tuple[object, ...], state: dict[str, object]
) -> OmniError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


def suggest(name: str, known: Iterable[str]) -> str:
    """The closest of `known` as a hint with a leading space, or nothing: " Did you mean 'x'?"."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
