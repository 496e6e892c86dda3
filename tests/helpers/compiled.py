"""Triton's kernels compiled ahead of time, for GPUs that are not here, and what they need there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_70": GPUTarget("cuda", 70, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A call of a kernel: which, and what Triton makes of its arguments."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel takes of a GPU: a thread's registers, bytes spilled, bytes shared."""

    registers: int
    spilled: int
    shared: int


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """What `call` launches, on tensors of any device; nothing runs, outputs stay as they were."""
    with _recorded() as found:
        call()
    return found


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    found: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(_read(self, args, kwargs))

    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run


def _read(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, options)


def compile_for(launch: Launch, target: str) -> Needs:
    """Compile a launch to machine code, and read what it takes."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    options = {**launch.options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        assert compiled.asm["hsaco"]
        registers, spilled = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Needs(registers, spilled, shared)
    assert compiled.asm["cubin"]
    return Needs(*_ask_ptxas(compiled.asm["ptx"], target), shared)


def _ask_ptxas(ptx: str, target: str) -> tuple[int, int]:
    tool = get_ptxas(int(TARGETS[target].arch)).path
    arch = re.findall(r"\.target\s+(\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        command = [tool, "-v", f"--gpu-name={arch}", str(file), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert arch.startswith(target)
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))


def table_of(launch: Launch, target: str, needs: Needs) -> str:
    """A line of a table for the log."""
    kind = next(iter(launch.signature.values())).removeprefix("*")
    return (
        f"{launch.name:<20} {kind:<5} {target:<7} {needs.registers:>4} registers "
        f"{needs.spilled:>4} bytes spilled {needs.shared:>7} bytes shared"
    )
