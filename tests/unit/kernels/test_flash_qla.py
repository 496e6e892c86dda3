"""FlashQLA through our slot, with a stand-in for the library, which a CPU cannot import."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from omnilit.errors import KernelError
from omnilit.kernels import GATED_DELTA_RULE
from omnilit.kernels.linear_attention import chunk_gated_delta_rule
from omnilit.kernels.machine import Machine
from tests.helpers.recurrence import delta_inputs

PACKAGES = {"flash-qla": "0.1.2"}
SEEN = SimpleNamespace(calls=0)


def their_rule(  # the signature of flash_qla 0.1.2, whose checks these are
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
    state_v_first: bool = False,
    auto_cp: bool = True,
    enable_fwd_cp_cache: bool = True,
) -> tuple[Tensor, Tensor | None]:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[0] == 1
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    assert (scale, initial_state, output_final_state) == (None, None, False)
    assert use_qk_l2norm_in_kernel
    assert cu_seqlens is not None
    assert cu_seqlens.dtype == torch.int64
    SEEN.calls += 1
    inputs = (q[0], k[0], v[0], g[0], beta[0])
    return chunk_gated_delta_rule(*inputs, bounds=cu_seqlens.tolist())[None], None


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("flash_qla")
    module.chunk_gated_delta_rule = their_rule
    monkeypatch.setitem(sys.modules, "flash_qla", module)


def test_parts_of_a_projection_reach_the_library_as_it_wants_them(library):
    rule = GATED_DELTA_RULE.resolve("flash_qla", Machine("cuda", sm=90, packages=PACKAGES))
    joined = torch.randn(40, 2 * 2 * 16 + 4 * 8, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = joined.split((32, 32, 32), -1)
    *_, decay, beta = delta_inputs(40, dtype=torch.bfloat16)
    inputs = (q.view(40, 2, 16), k.view(40, 2, 16), v.view(40, 4, 8), decay, beta)
    before = SEEN.calls
    results = [f(*inputs, bounds=(0, 13, 40)) for f in (rule, chunk_gated_delta_rule)]
    assert SEEN.calls == before + 1
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(out.float().sum(), joined)[0] for out in results))


def test_float32_is_refused_in_words(library):
    rule = GATED_DELTA_RULE.resolve("flash_qla", Machine("cuda", sm=90, packages=PACKAGES))
    with pytest.raises(KernelError) as caught:
        rule(*delta_inputs(5), bounds=(0, 5))
    assert str(caught.value) == (
        "model.ops_implementation.chunk_gated_delta_rule_implementation: 'flash_qla' computes in "
        "bfloat16, and this model in torch.float32. To fix: set it to fla, or "
        "mixed_precision.enable: true."
    )


@pytest.mark.parametrize(
    ("sm", "reasons"),
    [
        (80, ("needs SM 90 or newer, here is 80",)),
        (90, ()),
        (100, ()),
        (103, ()),
        (120, ("needs SM 103 or older, here is 120",)),  # its backward is missing there
    ],
)
def test_the_gpus_that_it_trains_on(sm, reasons):
    machine = Machine("cuda", sm=sm, packages=PACKAGES)
    assert GATED_DELTA_RULE.lacks("flash_qla", machine) == reasons
