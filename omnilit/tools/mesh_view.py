"""`omnilit env --config FILE --world-size N`: which ranks share what, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Final

from omnilit.cli.fitting import judge, read_config
from omnilit.cli.plan import read
from omnilit.cli.raw import Command
from omnilit.config.parallel_rules import sizes_of
from omnilit.config.parallel_sizes import ACCELERATOR, ParallelSizes
from omnilit.config.rules import run_rules
from omnilit.config.view import View
from omnilit.errors import ConfigError, Problem
from omnilit.logging import format_table
from omnilit.models.fit import ModelNumbers
from omnilit.parallel.grid import MeshAxis, used_axes

# What a look at the mesh reads of the values: where these begin
READ: Final = (
    "imports",
    ACCELERATOR,
    "model.config_path",
    "model.model_path",
    "model.trust_remote_code",
    "train.global_batch_size",
    "train.micro_batch_size",
)
MEANINGS: Final[Mapping[tuple[str, str], str]] = {
    ("data", "data"): "read different data",
    ("loss", "loss"): "hold tokens of their own, whose losses are summed",
    ("fsdp", "dp_replicate"): "hold the same dense parameters, whose gradients are summed",
    ("fsdp", "fsdp"): "share one copy of the dense parameters",
    ("sequence", "sequence"): "hold parts of the same sequences",
    ("cp", "cp"): "exchange keys and values",
    ("ulysses", "ulysses"): "trade their part of a sequence for heads",
    ("tp", "tp"): "split each matrix",
    ("pp", "pp"): "hold different layers",
    ("sparse", "dp_replicate"): "hold the same part of the same experts",
    ("sparse", "efsdp"): "share the same experts",
    ("sparse", "ep"): "hold different experts",
}
HEADER: Final = ("mesh", "axes", "ranks", "groups", "the ranks of a group", "first groups")
SIZES_HEADER: Final = ("axis", "given", "ranks")
MAX_GROUPS: Final = 3
AXES: Final = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp")  # outermost first


@dataclass(frozen=True, slots=True)
class MeshReport:
    """A mesh in words.

    Args:
        text: Its tables; empty where the sizes make up no mesh.
        problems: What does not fit.
    """

    text: str
    problems: tuple[Problem, ...]


def report_mesh(command: Command, world_size: int) -> MeshReport:
    """Describe the mesh of a configuration on a number of ranks, of which none is started.

    Every key and type is checked; of the values those that say how a model is spread.

    Args:
        command: Configuration files and overrides.
        world_size: Number of ranks.

    Raises:
        ConfigError: Keys or types are wrong.
    """
    reading = read(command)
    if reading.problems:
        raise ConfigError.of(reading.problems)
    view = View.of(reading.checked, list(reading.fields), world_size=world_size)
    problems = [problem for problem in run_rules(view) if problem.key.startswith(READ)]
    asked = sizes_of(view)
    if asked.problems():
        return MeshReport("", tuple(problems))
    numbers, misfits = _judge_model(view)
    problems += misfits
    if asked.problems(world_size):
        return MeshReport("", tuple(problems))
    sizes = asked.resolve(world_size)
    tables = [
        format_table(f"sizes of {world_size} ranks", SIZES_HEADER, _sizes(asked, sizes)),
        format_table("who shares what", HEADER, map(_group_row, used_axes(sizes))),
    ]
    if numbers is not None and not misfits:
        title = f"{numbers.model_type} on these ranks"
        tables.append(format_table(title, ("what", "in all", "a rank"), _parts(sizes, numbers)))
    return MeshReport("\n\n".join(tables) + "\n", tuple(problems))


def _judge_model(view: View) -> tuple[ModelNumbers | None, list[Problem]]:
    """The model's numbers, where one is named, and why the sizes do not divide them."""
    if not (view["model.config_path"] or view["model.model_path"]):
        return None, []
    try:
        config = read_config(view)
    except ConfigError as error:
        return None, list(error.problems)
    return ModelNumbers.of(config), judge(view, config)


def _sizes(asked: ParallelSizes, sizes: ParallelSizes) -> Iterator[tuple[object, ...]]:
    for name in AXES:
        yield name, getattr(asked, f"{name}_size"), getattr(sizes, f"{name}_size")
    if sizes.ep_size > 1:
        inner = [("efsdp", "", sizes.efsdp_size), ("ep", asked.ep_size, sizes.ep_size)]
        yield from reversed(inner) if sizes.ep_outside else inner


def _group_row(axis: MeshAxis) -> tuple[object, ...]:
    groups = axis.groups()
    shown = " | ".join(show_ranks(group) for group in groups[:MAX_GROUPS])
    more = " | ..." if len(groups) > MAX_GROUPS else ""
    meaning = MEANINGS[axis.mesh, axis.name]
    return axis.mesh, " x ".join(axis.parts), axis.size, len(groups), meaning, shown + more


def show_ranks(group: Sequence[int]) -> str:
    """The ranks of a group in short: they lie evenly spaced.

    Returns:
        `3`, `0-7`, `0 4`, or `0 4 .. 28`.
    """
    first, last = group[0], group[-1]
    if len(group) == 1:
        return str(first)
    if group[1] - first == 1:
        return f"{first}-{last}"
    return f"{first} {last}" if len(group) == 2 else f"{first} {group[1]} .. {last}"


def _parts(sizes: ParallelSizes, numbers: ModelNumbers) -> Iterator[tuple[str, str, str]]:
    """What the axes leave a rank of what they divide."""
    tp_size = sizes.tp_size if numbers.is_attention_split else 1
    layers = -(-numbers.layers // sizes.pp_size)
    even = numbers.layers % sizes.pp_size == 0
    yield "layers", str(numbers.layers), f"{'' if even else 'at most '}{layers}"
    for name, counts in (("attention heads", numbers.heads), ("key-value heads", numbers.kv_heads)):
        # where ranks outnumber the heads of keys and values, these are repeated
        own = [lcm(n // tp_size, sizes.ulysses_size) // sizes.ulysses_size for n in counts]
        yield name, _listed(counts), _listed(own)
    yield "hidden size", str(numbers.hidden), str(numbers.hidden)
    vocab, rest = divmod(numbers.vocab, sizes.tp_size)
    yield "vocabulary", str(numbers.vocab), f"at most {vocab + 1}" if rest else str(vocab)
    if numbers.experts:
        yield "experts of a layer", str(numbers.experts), str(numbers.experts // sizes.ep_size)


def _listed(counts: Sequence[int]) -> str:
    return " or ".join(map(str, counts)) or "none"
