"""What the host offers to kernels, as data, so that rules for GPUs are tested without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import torch

from omnilit.errors import ConfigError

DeviceType = Literal["cpu", "cuda", "npu"]

KERNEL_PACKAGES: Final = (
    "liger-kernel",
    "triton",
    "triton-ascend",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "flash-linear-attention",
    "flash-qla",
    "quack-kernels",
    "torch-npu",
)
# Instructions that make bfloat16 pay, by the CPU's maker: where Intel has avx512_bf16 without
# amx_bf16, a product of matrices takes twice the time of the float32 one
_FAST_BF16: Final = MappingProxyType(
    {
        "AuthenticAMD": frozenset({"avx512_bf16", "amx_bf16"}),
        "GenuineIntel": frozenset({"amx_bf16"}),
    }
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What kernels may ask about a machine; built by `detect`, written by hand in tests.

    Args:
        device: The kind of device that trains.
        sm: CUDA compute capability as major * 10 + minor, such as 90; None off CUDA.
        packages: Installed versions of the distributions that a kernel may need, by name.
        cpu_features: Flags of the CPU that make bfloat16 fast, of those that it has.
        name: What the device calls itself, such as "NVIDIA H100 80GB HBM3"; empty for a CPU.
    """

    device: DeviceType = "cpu"
    sm: int | None = None
    packages: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    cpu_features: frozenset[str] = frozenset()
    name: str = ""

    @classmethod
    def detect(cls, device_type: str) -> Machine:
        """Look at this machine; packages are looked up, never imported.

        Args:
            device_type: `cpu`, `cuda` or `npu`: what the run trains on.

        Raises:
            ConfigError: There is no such device here.
        """
        packages = MappingProxyType(_installed(KERNEL_PACKAGES))
        if device_type == "cpu":
            return cls("cpu", packages=packages, cpu_features=_read_cpu_features())
        if device_type == "npu" and "torch-npu" in packages:
            return cls("npu", packages=packages)
        # Kernels and rules never ask for a GPU themselves: they take a Machine.
        if device_type == "cuda" and torch.cuda.is_available():  # noqa: TID251
            major, minor = torch.cuda.get_device_capability()
            name = torch.cuda.get_device_name()
            return cls("cuda", sm=major * 10 + minor, packages=packages, name=name)
        raise ConfigError(
            key="trainer.accelerator",
            problem=f"this machine has no usable {device_type!r} device",
            fix="set trainer.accelerator: cpu, or run where torch finds the device",
        )

    @property
    def has_fast_bf16(self) -> bool:
        """True where bfloat16 pays: by instructions on a CPU, from SM 80 on CUDA, on any NPU."""
        if self.device == "cpu":
            return bool(self.cpu_features)
        return self.device == "npu" or (self.sm or 0) >= 80


def why_absent(device_type: str) -> list[str]:
    """What this machine or its packages lack for a kind of device; nothing where it is there.

    Args:
        device_type: `cpu`, `cuda` or `npu`.
    """
    if device_type == "cuda" and not torch.cuda.is_available():  # noqa: TID251
        if torch.version.cuda is None:
            return [f"torch {torch.__version__} is built without CUDA"]
        return ["torch finds no CUDA device"]
    if device_type == "npu" and not _installed(("torch-npu",)):
        return ["the package torch-npu is not installed"]
    return []


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # absence is an answer here
    return found


def _read_cpu_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    if not path.exists():  # not Linux
        return frozenset()
    first, _, _ = path.read_text().partition("\n\n")  # all cores are alike
    lines = (line.partition(":") for line in first.splitlines())
    said = {name.strip(): value.split() for name, _, value in lines}
    fast = _FAST_BF16.get(" ".join(said.get("vendor_id", [])), frozenset())
    return fast & frozenset(said.get("flags", []))
