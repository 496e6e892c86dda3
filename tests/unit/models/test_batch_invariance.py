"""A sample's logits and losses, alone and packed with others, to the bit."""

from __future__ import annotations

import pytest
import torch

from omnilit.config import OpsImplementationConfig
from omnilit.errors import KernelError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.bind import Binding, bind_kernels
from tests.helpers.invariance import depends_on_the_batch, invariant_rows
from tests.helpers.models import tiny

# samples of one token and of many, in the middle and at both ends, on either side of a block
ROWS = ((13, 2, 70), (70, 1, 13), (2, 13, 1, 13, 70))


def bind(model: torch.nn.Module, **ops: str) -> Binding:
    kernels = resolve_kernels(
        OpsImplementationConfig(**ops),  # type: ignore[arg-type]
        given=frozenset(ops),
        machine=Machine(),
        is_invariant=True,
    )
    return bind_kernels(model, kernels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "family",
    ["qwen3", "qwen2", "gemma2", "phi", "qwen3_moe", "gpt_oss", "deepseek_v3"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_losses_do_not_depend_on_what_a_sample_is_packed_with(family, dtype):
    model = tiny(family).to(dtype)
    binding = bind(model)
    with invariant_rows():
        assert not depends_on_the_batch(model, binding, ROWS)


def test_linear_attention_is_refused():
    with pytest.raises(KernelError) as error:
        bind(tiny("qwen3_next"))
    assert str(error.value) == (
        "model.ops_implementation.causal_conv1d_implementation: 'eager' is not known to compute a "
        "row alike in any batch, as train.enable_batch_invariant_mode wants. To fix: leave "
        "train.enable_batch_invariant_mode out."
    )


def test_they_do_with_torchs_operators():
    model = tiny("qwen3")
    assert depends_on_the_batch(model, bind(model), ROWS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["eager", "chunk_loss"])
def test_they_do_not_with_the_other_kernels_that_go_with_the_mode(attention, head):
    model = tiny("qwen3")
    binding = bind(
        model,
        attn_implementation=attention,
        cross_entropy_loss_implementation=head,
        rms_norm_implementation="eager",
    )
    with invariant_rows():
        assert not depends_on_the_batch(model, binding, ROWS)
