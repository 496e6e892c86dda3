import pytest

from omnilit.kernels.machine import Machine
from omnilit.kernels.peaks import peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L20", 119.5),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2565),
        ("NVIDIA B200", 2382),
        ("NVIDIA GB300", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
    ],
)
def test_a_listed_gpu_has_the_peak_of_its_datasheet(name, tflops):
    assert peak_flops(Machine("cuda", sm=90, name=name)) == tflops * 1e12


def test_an_ascend_has_its_peak_too():
    assert peak_flops(Machine("npu", name="Ascend910B3")) == 354e12


@pytest.mark.parametrize(
    "machine",
    [
        Machine("cpu", name="H100"),
        Machine("cuda", sm=86, name="NVIDIA RTX A1000"),
        Machine("cuda", sm=89, name="NVIDIA GeForce RTX 4090"),
        Machine("cuda", sm=89),
        Machine("npu", name="Ascend310P3"),
    ],
)
def test_a_device_that_is_not_listed_has_none_rather_than_a_guess(machine):
    assert peak_flops(machine) is None
