"""Linear attention inside models: packed rows, refusals, and what is left alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import sigmoid

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError, KernelError
from omnilit.kernels import rope
from omnilit.kernels.linear_attention import rms_norm_gated
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import Choice, KernelSet, resolve_kernels
from omnilit.kernels.slot import OpSlot
from omnilit.kernels.slots import BOUND_LATE
from omnilit.models.attention import Segments
from omnilit.models.bind import bind_kernels
from omnilit.models.delta_net import bound_linear_attention
from tests.helpers.models import gradients, packed_batch, reference_loss, tiny, worst_difference
from tests.helpers.recurrence import delta_rule
from tests.helpers.spread import cpu_kernels

FAMILIES = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid")
LENGTHS = (5, 1, 70, 9, 12)
FIELD = "chunk_gated_delta_rule_implementation"
# Rounding of both sides: a model in float64 is 2e-5 from either; what leaks is off by tenths
CLOSE = 1e-4


def packed_loss(model, batch, kernels=None):
    binding = bind_kernels(model, kernels or cpu_kernels())
    loss = binding.head.forward(model, batch).token_losses.sum() / batch.counts["tokens"]
    loss.backward()
    binding.verify_called()
    return loss


def with_kernel(field, kernel, monkeypatch):
    """What runs on a CPU, with a kernel of the test's own in one slot."""
    resolve = OpSlot.resolve

    def resolve_mine(slot, backend, machine):
        return kernel if backend == "mine" else resolve(slot, backend, machine)

    monkeypatch.setattr(OpSlot, "resolve", resolve_mine)
    choices = {**cpu_kernels().choices, field: Choice("mine", "given", is_given=True)}
    return KernelSet(choices, Machine("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_equals_one_sequence_at_a_time(family):
    plain, packed, batch = tiny(family), tiny(family), packed_batch(LENGTHS)
    expected = reference_loss(plain, batch)
    expected.backward()
    loss = packed_loss(packed, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert worst_difference(gradients(packed), gradients(plain)) <= CLOSE


def test_recomputed_blocks_give_the_same_gradients():
    plain, packed, batch = tiny("qwen3_5"), tiny("qwen3_5"), packed_batch(LENGTHS)
    reference_loss(plain, batch).backward()
    packed.activation_checkpointing_enable()
    packed_loss(packed, batch)
    assert worst_difference(gradients(packed), gradients(plain)) <= CLOSE


@pytest.mark.parametrize("broken", ["convolution", "rule"])
def test_a_part_that_ignores_the_bounds_is_seen(broken):
    plain, packed, batch = tiny("qwen3_5"), tiny("qwen3_5"), packed_batch(LENGTHS)
    reference_loss(plain, batch).backward()
    binding = bind_kernels(packed, cpu_kernels())
    bound = bound_linear_attention(packed)
    kernel = getattr(bound, broken)
    whole = (0, batch.bounds[-1])
    setattr(bound, broken, lambda *args, bounds: kernel(*args, bounds=whole))
    binding.head.forward(packed, batch).token_losses.sum().backward()
    assert worst_difference(gradients(packed), gradients(plain)) > 100 * CLOSE


def test_two_models_keep_their_own_rules(monkeypatch):
    kernels = with_kernel(FIELD, delta_rule, monkeypatch)
    policy, reference = tiny("qwen3_5"), tiny("qwen3_5")
    bind_kernels(policy, kernels)
    bind_kernels(reference, cpu_kernels())
    found = [bound_linear_attention(model) for model in (policy, reference)]
    assert [bound and bound.rule is delta_rule for bound in found] == [True, False]
    kinds = {type(model.model.layers[0].linear_attn).forward for model in (policy, reference)}
    assert kinds == {type(tiny("qwen3_5").model.layers[0].linear_attn).forward}


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_through_the_models_own_functions(family):
    plain, bound = tiny(family).eval(), tiny(family).eval()
    bind_kernels(bound, cpu_kernels())
    prompt = torch.arange(3, 12)[None]
    outputs = [
        getattr(model, "generate")(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)  # noqa: B009
        for model in (plain, bound)
    ]
    assert torch.equal(*outputs)


def test_a_packed_row_without_bounds_is_refused():
    model, batch = tiny("qwen3_5"), packed_batch(LENGTHS)
    binding = bind_kernels(model, cpu_kernels())
    layer = model.model.layers[0].linear_attn
    layer.register_forward_pre_hook(forget_bounds, with_kwargs=True)
    with pytest.raises(KernelError, match="does not say where the sequences of a row end"):
        binding.head.forward(model, batch)


def forget_bounds(module, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != "cu_seq_lens_q"}


def test_a_packed_row_with_a_cache_is_refused():
    model = tiny("qwen3_5")
    bind_kernels(model, cpu_kernels())
    with pytest.raises(KernelError, match="a packed row came with a cache"):
        model(torch.arange(3, 8)[None], cu_seq_lens_q=Segments([0, 2, 5]), use_cache=True)


def test_bounds_that_do_not_fit_are_refused():
    model = tiny("qwen3_5")
    bind_kernels(model, cpu_kernels())
    with pytest.raises(KernelError) as caught:
        model(torch.arange(3, 8)[None], cu_seq_lens_q=Segments([0, 4]), use_cache=False)
    assert str(caught.value) == (
        "model.ops_implementation.causal_conv1d_implementation: bounds that end at 4 came with 1 "
        "rows of 5 tokens. To fix: pack into one row whose length is the last bound, without a "
        "cache."
    )


@pytest.mark.parametrize(
    "field", ["rms_norm_gated_implementation", "causal_conv1d_implementation", FIELD]
)
def test_a_given_backend_that_cannot_run_is_refused_when_it_is_bound(field):
    ops = replace(OpsImplementationConfig(preset="eager"), **{field: "fla"})
    kernels = resolve_kernels(ops, given=frozenset({field}), machine=Machine("cpu"))
    with pytest.raises(KernelError, match="'fla' cannot run here: needs cuda, this machine trains"):
        bind_kernels(tiny("qwen3_5"), kernels)


def test_the_documented_defaults_refuse_these_models_on_a_cpu_and_no_others():
    ops = OpsImplementationConfig()
    late = {
        field: Choice(getattr(ops, field), "preset reference", is_given=False)
        for field in BOUND_LATE
    }
    kernels = KernelSet({**cpu_kernels().choices, **late}, Machine("cpu"))
    bind_kernels(tiny("qwen3"), kernels)
    with pytest.raises(KernelError, match="'fla' cannot run here: needs cuda"):
        bind_kernels(tiny("qwen3_5"), kernels)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "gelu"}, "Qwen3_5GatedDeltaNet convolves with the activation 'gelu'"),
        ({"layer_types": ["linear_attention"] * 2}, "it has no attention that goes through"),
    ],
)
def test_models_of_another_form_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        bind_kernels(tiny("qwen3_5", **change), cpu_kernels())


def test_functions_that_do_something_else_are_refused(monkeypatch):
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    def rule(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return 2 * args[2], None

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", rule)
    with pytest.raises(ConfigError, match="Qwen3_5GatedDeltaNet has a delta rule that"):
        bind_kernels(tiny("qwen3_5"), cpu_kernels())
    monkeypatch.undo()
    monkeypatch.setattr(modeling, "causal_conv1d_fn", lambda x, *args, **kwargs: sigmoid(x))
    with pytest.raises(ConfigError, match="Qwen3_5GatedDeltaNet convolves in a way that"):
        bind_kernels(tiny("qwen3_5"), cpu_kernels())


def test_a_gated_norm_of_another_backend_stands_in_for_the_models_own(monkeypatch):
    kernels = with_kernel("rms_norm_gated_implementation", rms_norm_gated, monkeypatch)
    plain, packed, batch = tiny("qwen3_next"), tiny("qwen3_next"), packed_batch(LENGTHS)
    reference_loss(plain, batch).backward()
    packed_loss(packed, batch, kernels)
    assert worst_difference(gradients(packed), gradients(plain)) <= CLOSE


def test_a_rotary_kernel_gets_the_part_of_a_head_that_turns(monkeypatch):
    widths: set[tuple[int, int]] = set()

    def whole_heads(q, k, cos, sin, unsqueeze_dim=1):
        widths.add((q.shape[-1], cos.shape[-1]))
        return rope.eager(q, k, cos, sin, unsqueeze_dim)

    kernels = with_kernel("rotary_pos_emb_implementation", whole_heads, monkeypatch)
    plain, packed, batch = tiny("qwen3_5"), tiny("qwen3_5"), packed_batch(LENGTHS)
    reference_loss(plain, batch).backward()
    packed_loss(packed, batch, kernels)
    assert widths == {(8, 8)}
    assert worst_difference(gradients(packed), gradients(plain)) <= CLOSE


def test_a_copy_of_a_bound_model_computes_the_same():
    model, batch = tiny("qwen3_5"), packed_batch(LENGTHS)
    binding = bind_kernels(model, cpu_kernels())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        twin.load_state_dict(model.state_dict())
    outputs = [
        m(batch.input_ids, cu_seq_lens_q=Segments(batch.bounds), use_cache=False).logits
        for m in (model, twin)
    ]
    assert binding.table
    assert torch.equal(*outputs)
