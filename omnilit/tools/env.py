"""`omnilit env`: what this machine and this installation can run, for people and for reports."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Final

import torch

from omnilit import __version__
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import table_of_backends
from omnilit.logging import format_table
from omnilit.plugins import find_plugins
from omnilit.tools.host import best_machine

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


def run(argv: Sequence[str]) -> int:
    """Print versions, the machine and the kernels; returns the exit code.

    Raises:
        ConfigError: An argument was given; there is none.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write("usage: omnilit env\n\nPrints versions, devices and kernels.\n")
        return 0
    if argv:
        raise ConfigError(key=argv[0], problem="env takes no arguments", fix="leave it out")
    sys.stdout.write(report(best_machine()))
    return 0


def report(machine: Machine) -> str:
    """All tables, for `machine`."""
    tables = (
        format_table("versions", ("package", "version"), version_rows()),
        format_table("machine", ("what", "value"), machine_rows(machine)),
        format_table("kernels", ("slot", "backend", "here"), table_of_backends(machine)),
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
