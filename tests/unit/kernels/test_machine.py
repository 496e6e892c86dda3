from __future__ import annotations

import pytest
import torch

from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine, _read_cpu_features


def test_packages_are_looked_up_without_importing_them():
    machine = Machine.detect("cpu")
    assert machine.device == "cpu"
    assert machine.sm is None
    assert "flash-attn" not in machine.packages
    assert set(machine.packages) <= {"triton", "liger-kernel", "flash-linear-attention"}


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "npu", "tpu"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError) as error:
        Machine.detect(device)
    assert str(error.value) == (
        f"trainer.accelerator: this machine has no usable {device!r} device. "
        "To fix: set trainer.accelerator: cpu, or run where torch finds the device."
    )


def test_cpu_features_are_read_from_the_flags(tmp_path):
    file = tmp_path / "cpuinfo"
    one = "vendor_id\t: {}\nmodel name : x\nflags\t\t: fpu {} amx_tile\n\n"
    for maker, flags, fast in (
        ("AuthenticAMD", "avx512_bf16", {"avx512_bf16"}),
        ("GenuineIntel", "avx512_bf16 amx_bf16", {"amx_bf16"}),
        ("GenuineIntel", "avx512_bf16", set()),  # half as fast as float32
        ("AuthenticAMD", "avx512f", set()),
    ):
        file.write_text(2 * one.format(maker, flags))
        assert _read_cpu_features(file) == fast
    file.write_text("flags : fpu\n")
    assert _read_cpu_features(file) == frozenset()
    assert _read_cpu_features(tmp_path / "none") == frozenset()


def test_bfloat16_pays_where_there_are_instructions_for_it():
    assert Machine("cpu", cpu_features=frozenset({"amx_bf16"})).has_fast_bf16
    assert not Machine("cpu").has_fast_bf16
    assert Machine("cuda", sm=80).has_fast_bf16
    assert not Machine("cuda", sm=75).has_fast_bf16
    assert Machine("npu").has_fast_bf16
