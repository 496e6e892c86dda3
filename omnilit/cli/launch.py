"""How many processes this run has, and on what kind of device, before any of them starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from omnilit.errors import Problem

DEVICE_TYPES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "npu": "npu"}


@dataclass(frozen=True, slots=True)
class Launch:
    """The processes of a run.

    Args:
        device_type: "cpu", "cuda" or "npu".
        num_devices: Processes on this node.
        num_nodes: Nodes.
        launcher: Who started the processes: "torchrun", "SLURM", or nothing when we do.
        rank: This process's global rank.
    """

    device_type: str
    num_devices: int
    num_nodes: int
    launcher: str = ""
    rank: int = 0

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_devices * self.num_nodes


def plan_launch(
    trainer: Mapping[str, object], environment: Mapping[str, str] = os.environ
) -> tuple[Launch, list[Problem]]:
    """Read the `trainer` group and the launcher's environment.

    Under a launcher devices and nodes come from it; another given value is a problem.

    Args:
        trainer: The given keys of the `trainer` group.
        environment: The process's environment.
    """
    device_type, problems = _device_type(str(trainer.get("accelerator", "auto")))
    outside = _launched(environment)
    if outside is None:
        own, more = _own_launch(trainer, device_type, environment)
        return own, problems + more
    launch = replace(outside, device_type=device_type)
    for key, value in (("devices", launch.num_devices), ("num_nodes", launch.num_nodes)):
        given = trainer.get(key, "auto")
        if given not in ("auto", -1, "-1") and _count(given) != value:
            problems.append(
                Problem(
                    f"trainer.{key}",
                    f"{given} was given, but {launch.launcher} started {value}",
                    "leave it out under a launcher",
                )
            )
    return launch, problems


def _device_type(accelerator: str) -> tuple[str, list[Problem]]:
    has_cuda = torch.cuda.is_available()  # noqa: TID251 - before a Machine can be made
    if accelerator == "auto":
        return ("cuda" if has_cuda else "cpu"), []
    device_type = DEVICE_TYPES.get(accelerator)
    if device_type is None:
        fix = f"use one of auto, {', '.join(DEVICE_TYPES)}"
        return "cpu", [Problem("trainer.accelerator", f"{accelerator!r} is not supported", fix)]
    if device_type == "cuda" and not has_cuda:
        problem = f"{accelerator!r} was asked for, but this machine has no CUDA device"
        fix = "set trainer.accelerator: cpu, or run where a GPU is"
        return "cpu", [Problem("trainer.accelerator", problem, fix)]
    if device_type == "npu":
        problem = "'npu' was asked for, but torch-npu finds no device here"
        fix = "set trainer.accelerator: cpu, or run where an NPU is"
        return "cpu", [Problem("trainer.accelerator", problem, fix)]
    return device_type, []


def _launched(environment: Mapping[str, str]) -> Launch | None:
    """The launch that torchrun or SLURM describes, if one of them started this process."""
    if "TORCHELASTIC_RUN_ID" in environment:
        local, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        return Launch("cpu", local, world // local, "torchrun", int(environment["RANK"]))
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment and not interactive:
        world, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
        return Launch("cpu", world // nodes, nodes, "SLURM", int(environment["SLURM_PROCID"]))
    return None


def _own_launch(
    trainer: Mapping[str, object], device_type: str, environment: Mapping[str, str]
) -> tuple[Launch, list[Problem]]:
    devices, nodes = trainer.get("devices", "auto"), _count(trainer.get("num_nodes", 1))
    if devices in ("auto", -1, "-1"):
        count = torch.cuda.device_count() if device_type == "cuda" else 1
    else:
        count = _count(devices)
    rank = int(environment.get("LOCAL_RANK", "0"))
    problems = [
        Problem(f"trainer.{key}", f"{given!r} is not a number of processes", "give 1 or more")
        for key, given, value in (
            ("devices", devices, count),
            ("num_nodes", trainer.get("num_nodes"), nodes),
        )
        if value < 1
    ]
    return Launch(device_type, max(count, 1), max(nodes, 1), rank=rank), problems


def _count(given: object) -> int:
    """A number of devices: itself, or the length of a list; 0 where it is neither."""
    if isinstance(given, list):
        return len(given)
    if isinstance(given, bool):
        return 0
    text = str(given)
    return int(text) if text.isdigit() else 0
