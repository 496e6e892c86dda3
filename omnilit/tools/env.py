"""`omnilit env`: what this machine can run, and how the ranks of a run would share a model."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Final

import torch

from omnilit import __version__
from omnilit.errors import ConfigError, Problem
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import table_of_backends
from omnilit.logging import format_table
from omnilit.plugins import find_plugins
from omnilit.tools.flags import Flags, take_value
from omnilit.tools.host import best_machine

if TYPE_CHECKING:
    from omnilit.cli.raw import Command

PACKAGES: Final = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "jsonargparse",
    "numpy",
    "pyarrow",
    "wandb",
    "triton",
    "liger-kernel",
    "flash-linear-attention",
    "flash-attn",
    "torch-npu",
)

Rows = list[tuple[str, str]]


USAGE: Final = """\
usage: omnilit env
       omnilit env --config FILE --world-size N [--path.to.field VALUE]
       omnilit env --config FILE --world-size N --rehearse [--rank R] [--path.to.field VALUE]

Prints versions, devices and kernels. With a training configuration and a number of ranks it prints
the mesh that they would make up, which ranks share what, and what does not fit; nothing is started.
With --rehearse it also builds and shards the model for one rank, 0 or R, without memory for it, and
prints what that rank would hold, what it would send in a step, and what is divided unevenly.
Exits with 2 where something does not fit.
"""
WORLD: Final = "world-size"
REHEARSE: Final = "rehearse"
RANK: Final = "rank"
OWN: Final = (WORLD, REHEARSE, RANK)


def run(argv: Sequence[str]) -> int:
    """Print versions, the machine and the kernels, or a mesh; returns the exit code.

    Raises:
        ConfigError: Flags are wrong, or the sizes of a mesh do not fit.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return 0
    if argv:
        return _run_mesh(argv)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    sys.stdout.write(report(best_machine(), width=width))
    return 0


def _run_mesh(argv: Sequence[str]) -> int:
    # these import lightning, which the versions can do without
    from omnilit.cli.raw import read_command
    from omnilit.tools.mesh_view import report_mesh

    command = read_command(argv)
    own = {name: words for name, words in command.flags if name in OWN}
    problems: list[Problem] = []
    world_size = _world_size(own, problems)
    rank = _rehearsed_rank(own, world_size, problems)
    if not command.files:
        problem = "without a configuration env takes no arguments"
        problems.append(Problem(argv[0], problem, "leave it out, or give --config FILE"))
    if problems:
        raise ConfigError.of(problems)
    command = replace(command, flags=tuple(flag for flag in command.flags if flag[0] not in own))
    found = report_mesh(command, world_size)
    sys.stdout.write(found.text)
    if found.problems:
        raise ConfigError.of(found.problems)
    if rank is not None:
        _rehearse(command, world_size, rank)
    return 0


def _world_size(own: Flags, problems: list[Problem]) -> int:
    world_size = take_value(own, WORLD, int, problems) if WORLD in own else 0
    if not problems and world_size < 1:
        found = f"{world_size} is no number of ranks" if WORLD in own else "is not given"
        problems.append(Problem(f"--{WORLD}", found, "give the number of ranks"))
    return world_size


def _rehearsed_rank(own: Flags, world_size: int, problems: list[Problem]) -> int | None:
    """The rank to rehearse; None where that is not asked for."""
    if own.get(REHEARSE):
        problem = f"takes no value, and {' '.join(own[REHEARSE])} is one"
        problems.append(Problem(f"--{REHEARSE}", problem, f"write --{REHEARSE} --{RANK} R"))
    if RANK not in own:
        return 0 if REHEARSE in own else None
    rank = take_value(own, RANK, int, problems)
    if REHEARSE not in own:
        problem = f"has no effect without --{REHEARSE}"
        problems.append(Problem(f"--{RANK}", problem, f"add --{REHEARSE}, or leave it out"))
    if world_size > 0 and not 0 <= rank < world_size:
        problem = f"{rank} is none of the {world_size} ranks"
        problems.append(Problem(f"--{RANK}", problem, f"give one from 0 to {world_size - 1}"))
    return rank


def _rehearse(command: Command, world_size: int, rank: int) -> None:
    from omnilit.tools.rehearsal import rehearse_command
    from omnilit.tools.rehearsal_view import describe

    found = rehearse_command(command, world_size=world_size, rank=rank)
    sys.stdout.write(f"\n{describe(found)}")


def report(machine: Machine, *, width: int | None = None) -> str:
    """All tables, for `machine`.

    Args:
        machine: What kernels are asked of.
        width: Columns of the terminal; None for lines as long as they are, as for a pipe.
    """
    tables = (
        format_table("versions", ("package", "version"), version_rows()),
        format_table("machine", ("what", "value"), machine_rows(machine)),
        format_table(
            "kernels", ("slot", "backend", "here"), table_of_backends(machine), width=width
        ),
    )
    if plugins := find_plugins():
        rows = [(p.name, p.module, p.distribution, "on" if p.is_on else "off") for p in plugins]
        tables += (format_table("plug-ins", ("name", "imports", "of", "state"), rows),)
    return "\n\n".join(tables) + "\n"


def version_rows() -> Rows:
    """Package and version; looked up, not imported, so that a broken package does no harm."""
    rows: Rows = [("omnilit", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:  # absence is an answer here
            rows.append((name, "not installed"))
    return rows


def machine_rows(machine: Machine) -> Rows:
    """Devices, CPU features and threads."""
    flags = f" ({', '.join(sorted(machine.cpu_features))})" if machine.cpu_features else ""
    rows: Rows = [
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("trains on", machine.device),
    ]
    if machine.device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows += [("GPUs", ", ".join(names)), ("SM", str(machine.sm))]
    rows += [
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("fast bfloat16", f"yes{flags}" if machine.has_fast_bf16 else "no"),
        ("cores", str(os.cpu_count())),
        ("threads of torch", str(torch.get_num_threads())),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ]
    return rows
