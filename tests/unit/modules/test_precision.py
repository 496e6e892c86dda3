import pytest
import torch

from omnilit.config import MixedPrecisionConfig
from omnilit.kernels.machine import Machine
from omnilit.modules.precision import Precision

SLOW, FAST = Machine("cpu"), Machine("cpu", cpu_features=frozenset({"avx512_bf16"}))


@pytest.mark.parametrize(
    ("machine", "compute"),
    [
        (SLOW, torch.float32),
        (FAST, torch.bfloat16),
        (Machine("cuda", sm=75), torch.float32),
        (Machine("cuda", sm=80), torch.bfloat16),
    ],
)
def test_auto_computes_in_bfloat16_where_it_pays(machine, compute):
    precision = Precision.of(MixedPrecisionConfig(param_dtype="auto"), machine)
    assert (precision.compute, precision.master) == (compute, torch.float32)
    assert precision.policy.param_dtype == compute
    assert precision.policy.reduce_dtype == torch.float32


def test_off_means_everything_in_the_master_dtype():
    config = MixedPrecisionConfig(enable=False, master_dtype="bfloat16")
    precision = Precision.of(config, FAST)
    assert (precision.compute, precision.master) == (torch.bfloat16, torch.bfloat16)
    assert precision.policy.param_dtype is None
    assert str(precision) == "computes in bfloat16, stores bfloat16"
