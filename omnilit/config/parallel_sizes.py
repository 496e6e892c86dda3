"""Sizes of the parallel axes, and how they fill the ranks of a run: arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from omnilit.config.accelerator import AcceleratorConfig
from omnilit.errors import ConfigError, Problem

ACCELERATOR: Final = "train.accelerator"
DATA_SIZES: Final = ("dp_replicate_size", "dp_shard_size")
# Of the ranks that read the same data, outermost first
SHARING_SIZES: Final = ("pp_size", "cp_size", "ulysses_size", "tp_size")


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """How many ranks each parallel axis has; names as in `train.accelerator`.

    pp x dp_replicate x dp_shard x cp x ulysses x tp are all ranks, tp counting fastest. The
    expert axes are another view of the ranks that hold one copy of a stage's parameters:
    efsdp x ep = dp_shard x cp x ulysses x tp.

    Args:
        dp_replicate_size: Copies of the sharded model; -1 takes what the others leave.
        dp_shard_size: Data ranks that share one copy; -1 takes what the others leave.
        tp_size: Ranks that split each matrix.
        ep_size: Ranks that split the experts.
        ep_outside: Count ep slower than efsdp: neighbours then share one expert's shards.
        pp_size: Pipeline stages.
        ulysses_size: Ranks that split a sequence and trade it for heads.
        cp_size: Ranks that split a sequence and exchange keys and values.
        is_ddp: Every rank that tp and pp leave alone holds all parameters; nothing is sharded.
    """

    dp_replicate_size: int = -1
    dp_shard_size: int = -1
    tp_size: int = 1
    ep_size: int = 1
    ep_outside: bool = False
    pp_size: int = 1
    ulysses_size: int = 1
    cp_size: int = 1
    is_ddp: bool = False

    @classmethod
    def of(cls, config: AcceleratorConfig) -> ParallelSizes:
        """The sizes that a configuration asks for.

        Raises:
            ConfigError: They fit no number of ranks.
        """
        sizes = cls(
            dp_replicate_size=config.dp_replicate_size,
            dp_shard_size=config.dp_shard_size,
            tp_size=config.tp_size,
            ep_size=config.ep_size,
            ep_outside=config.ep_outside,
            pp_size=config.pp_size,
            ulysses_size=config.ulysses_size,
            cp_size=config.cp_size,
            is_ddp=config.fsdp_config.fsdp_mode == "ddp",
        )
        if problems := sizes.problems():
            raise ConfigError.of(problems)
        return sizes

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def sequence_size(self) -> int:
        """Ranks that hold parts of the same sequences."""
        return self.cp_size * self.ulysses_size

    @property
    def sharing_size(self) -> int:
        """Ranks that read the same data."""
        return self.pp_size * self.sequence_size * self.tp_size

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.data_size * self.sharing_size

    @property
    def fsdp_size(self) -> int:
        """Ranks that share one copy of a dense parameter, tensor parallelism aside."""
        return 1 if self.is_ddp else self.dp_shard_size * self.sequence_size

    @property
    def replicate_size(self) -> int:
        """Copies of a dense parameter: under DDP one for each rank that holds tokens."""
        return self.data_size * self.sequence_size // self.fsdp_size

    @property
    def copy_size(self) -> int:
        """Ranks that hold one copy of a stage's parameters: ep and efsdp divide them up."""
        return self.dp_shard_size * self.sequence_size * self.tp_size

    @property
    def efsdp_size(self) -> int:
        """Ranks that share one expert's parameters."""
        return self.copy_size // self.ep_size

    def resolve(self, world_size: int) -> ParallelSizes:
        """The same sizes with -1 filled in, so that they multiply to `world_size`.

        Both data sizes at -1 means one copy, sharded over all data ranks; under DDP, copies only.

        Raises:
            ConfigError: The sizes do not divide or do not multiply to `world_size`.
        """
        if problems := self.problems(world_size):
            raise ConfigError.of(problems)
        filled = self._filled(world_size)
        assert filled is not None
        return filled

    def problems(self, world_size: int | None = None) -> list[Problem]:
        """What is wrong with the sizes.

        Args:
            world_size: All ranks, where that is known already.
        """
        found = [*self._wrong_numbers(), *self._wrong_under_ddp()]
        if found:
            return found
        filled = self
        if world_size is not None:
            fitting = self._filled(world_size)
            if fitting is None:
                return [self._does_not_fit(world_size)]
            filled = fitting
        return filled._wrong_experts()  # noqa: SLF001 - of the same class

    def _wrong_numbers(self) -> list[Problem]:
        found: list[Problem] = []
        for name in (*DATA_SIZES, *SHARING_SIZES, "ep_size"):
            size: int = getattr(self, name)
            is_open = size == -1 and name in DATA_SIZES
            if size >= 1 or is_open:
                continue
            if name in DATA_SIZES:
                problem = f"{size} is neither -1 nor a positive number of ranks"
                fix = "give -1 to take what the other sizes leave, or a number of ranks"
            else:
                problem, fix = f"{size} is not a positive number of ranks", "give 1 or more"
            found.append(Problem(f"{ACCELERATOR}.{name}", problem, fix))
        return found

    def _wrong_under_ddp(self) -> list[Problem]:
        found: list[Problem] = []
        if self.is_ddp and self.dp_shard_size not in {-1, 1}:
            size = self.dp_shard_size
            problem = f"gives each rank the whole model, so {size} ranks cannot share one"
            fix = "leave dp_shard_size out, or set fsdp_mode: fsdp2"
            found.append(Problem(f"{ACCELERATOR}.dp_shard_size", f"fsdp_mode: ddp {problem}", fix))
        if self.is_ddp and self.ep_size > 1:
            problem = f"gives each rank all experts, so {self.ep_size} ranks cannot split them"
            fix = "leave ep_size out, or set fsdp_mode: fsdp2"
            found.append(Problem(f"{ACCELERATOR}.ep_size", f"fsdp_mode: ddp {problem}", fix))
        return found

    def _filled(self, world_size: int) -> ParallelSizes | None:
        """All sizes as numbers of ranks; None where they do not make up `world_size`."""
        data, rest = divmod(world_size, self.sharing_size)
        fixed = 1 if self.is_ddp else self.dp_shard_size
        fitting = None if rest else fit_data_sizes(self.dp_replicate_size, fixed, ranks=data)
        if fitting is None:
            return None
        return replace(self, dp_replicate_size=fitting[0], dp_shard_size=fitting[1])

    def _does_not_fit(self, world_size: int) -> Problem:
        chosen = [(name, getattr(self, name)) for name in DATA_SIZES if getattr(self, name) > 0]
        chosen += [(name, getattr(self, name)) for name in SHARING_SIZES if getattr(self, name) > 1]
        problem = f"{describe(chosen)} does not make up the {world_size} ranks of this run"
        data, rest = divmod(world_size, self.sharing_size)
        if rest:
            fix = "choose sizes whose product divides the number of ranks"
        elif self.is_ddp:
            fix = f"leave dp_replicate_size out, or set it to {data}"
        else:
            fix = "set dp_shard_size: -1, or choose sizes whose product is the number of ranks"
        culprits = SHARING_SIZES if rest else reversed(DATA_SIZES)
        key = next(name for name in culprits if name in dict(chosen))
        return Problem(f"{ACCELERATOR}.{key}", problem, fix)

    def _wrong_experts(self) -> list[Problem]:
        ranks = self.copy_size
        if self.dp_shard_size == -1 or ranks % self.ep_size == 0:  # under DDP ep_size is 1
            return []
        names = ("dp_shard_size", "cp_size", "ulysses_size", "tp_size")
        parts = [(name, getattr(self, name)) for name in names if getattr(self, name) > 1]
        made_of = f" ({describe(parts)})" if parts else ""
        divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        return [
            Problem(
                f"{ACCELERATOR}.ep_size",
                f"{self.ep_size} does not divide the {ranks} ranks that hold one copy of the "
                f"model{made_of}",
                f"set ep_size to one of {divisors}, or change the other sizes",
            )
        ]


def fit_data_sizes(replicate: int, shard: int, *, ranks: int) -> tuple[int, int] | None:
    """Sizes of the two data-parallel axes with -1 filled in, so that they multiply to `ranks`.

    Args:
        replicate: Copies of the sharded model; -1 takes what the other leaves, or 1.
        shard: Ranks that share one copy; -1 takes what the other leaves.
        ranks: Those that read different data.

    Returns:
        Both sizes; None where they do not divide or do not make up the ranks.
    """
    known = max(replicate, 1) * max(shard, 1)
    if ranks % known:
        return None
    if shard == -1:
        replicate, shard = max(replicate, 1), ranks // known
    elif replicate == -1:
        replicate = ranks // known
    return (replicate, shard) if replicate * shard == ranks else None


def describe(sizes: Iterable[tuple[str, int]]) -> str:
    """Named sizes as a product with its value: `pp_size 2 * tp_size 4 = 8`."""
    sizes = list(sizes)
    product = " * ".join(f"{name} {size}" for name, size in sizes)
    return product if len(sizes) < 2 else f"{product} = {prod(size for _, size in sizes)}"
