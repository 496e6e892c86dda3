"""Our Triton kernels become machine code for a GPU; tests/invariant has all GPUs and types."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.compiled import compile_for, launches_of
from tests.helpers.triton_calls import CALLS


@pytest.mark.parametrize("name", CALLS)
def test_kernels_compile_for_hopper_without_spilling(name):
    kernels = {launch.name: launch for launch in launches_of(lambda: CALLS[name](torch.bfloat16))}
    assert kernels
    for launch in kernels.values():
        needs = compile_for(launch, "sm_90")
        assert needs.spilled == 0
        assert needs.registers <= 255
        assert needs.shared <= 99 * 1024
