from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError, KernelError
from omnilit.kernels import rms_norm, rope, swiglu
from omnilit.kernels.machine import Machine
from omnilit.kernels.moe import eager as loop_over_experts
from omnilit.kernels.resolve import Choice, KernelSet, resolve_kernels
from omnilit.kernels.slot import OpSlot
from omnilit.models import bind as bind_module
from omnilit.models.attention import PackedRun, Segments
from omnilit.models.bind import Binding, bind_kernels
from tests.helpers.models import (
    gradients,
    packed_batch,
    reference_loss,
    tiny,
    worst_difference,
)

FAMILIES = (
    "qwen3",
    "qwen3_tied",
    "llama",
    "qwen2",
    "qwen3_moe",
    "gemma3",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "cohere",
    "granite",
    "stablelm",
    "llama4",
    "phimoe",
)
CPU = Machine("cpu")
LENGTHS = (5, 1, 17, 9, 12)


def kernels_of(**fields: str) -> KernelSet:
    return resolve_kernels(
        replace(OpsImplementationConfig(), **fields), given=frozenset(fields), machine=CPU
    )


def mean_loss(binding: Binding, model, batch):
    return binding.head.forward(model, batch).token_losses.sum() / batch.counts["tokens"]


def test_two_models_in_one_process_keep_their_own_kernels():
    policy, reference = tiny("qwen3"), tiny("qwen3")
    chosen = {
        model: kernels_of(attn_implementation=name)
        for model, name in ((policy, "sdpa"), (reference, "eager"))
    }
    bindings = {model: bind_kernels(model, kernels) for model, kernels in chosen.items()}
    batch = packed_batch(LENGTHS)
    losses = [
        bindings[model].head.forward(model, batch).token_losses for model in (policy, reference)
    ]
    torch.testing.assert_close(*losses)
    kernels = [
        model.model.layers[0].self_attn.omnilit_attention.kernel.__name__
        for model in (policy, reference)
    ]
    assert kernels == ["sdpa", "eager"]
    with pytest.raises(KernelError, match="never called"):  # calls of one are not the other's
        bind_kernels(tiny("qwen3"), chosen[policy]).verify_called()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_equals_one_sequence_at_a_time(family, attention):
    plain, packed = tiny(family), tiny(family)
    batch = packed_batch(LENGTHS)
    expected = reference_loss(plain, batch)
    expected.backward()
    binding = bind_kernels(packed, kernels_of(attn_implementation=attention))
    loss = mean_loss(binding, packed, batch)
    loss.backward()
    binding.verify_called()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    # Summed in another order; the measured differences are below 5e-6.
    assert worst_difference(gradients(packed), gradients(plain)) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_oss", "stablelm", "llama4"])
def test_gradient_checkpointing_hands_the_bounds_down(family):
    plain, packed = tiny(family), tiny(family)
    batch = packed_batch(LENGTHS)
    reference_loss(plain, batch).backward()
    binding = bind_kernels(packed, kernels_of())
    packed.activation_checkpointing_enable()
    mean_loss(binding, packed, batch).backward()
    assert worst_difference(gradients(packed), gradients(plain)) <= 1e-5


def test_ignoring_the_bounds_would_be_seen():
    model, batch = tiny("qwen3"), packed_batch(LENGTHS)
    binding = bind_kernels(model, kernels_of())
    one_segment = copy.copy(batch)
    object.__setattr__(one_segment, "bounds", [0, batch.bounds[-1]])
    right, wrong = (binding.head.forward(model, b).token_losses.sum() for b in (batch, one_segment))
    assert abs(right - wrong) / right > 1e-3


def bind_reference_kernels(model, monkeypatch, fields: dict[str, object]) -> Binding:
    """Bind the eager references as if they were backends of another name."""
    choices = dict(kernels_of().choices)
    choices.update({field: Choice("mine", "given", is_given=True) for field in fields})
    kernels = KernelSet(choices, CPU)
    resolve = OpSlot.resolve

    def resolve_mine(slot, backend, machine):
        field = slot.key.rpartition(".")[2]
        return fields[field] if backend == "mine" else resolve(slot, backend, machine)

    monkeypatch.setattr(OpSlot, "resolve", resolve_mine)
    return bind_kernels(model, kernels)


MODULE_KERNELS = {
    "rms_norm_implementation": rms_norm.eager,
    "swiglu_mlp_implementation": swiglu.eager,
    "rotary_pos_emb_implementation": rope.eager,
    "moe_implementation": loop_over_experts,
}


@pytest.mark.parametrize(
    ("family", "slots"),
    [
        ("qwen3", ("rms_norm", "swiglu_mlp", "rotary_pos_emb")),
        ("llama", ("rms_norm", "swiglu_mlp", "rotary_pos_emb")),
        ("qwen3_moe", ("rms_norm", "rotary_pos_emb", "moe")),
        ("gemma3", ("rms_norm", "rotary_pos_emb")),
        ("deepseek_v3", ("rms_norm", "swiglu_mlp", "moe")),
        ("gpt_oss", ("rms_norm",)),
    ],
)
def test_module_kernels_bind_to_one_instance(family, slots, monkeypatch):
    plain, bound, batch = tiny(family), tiny(family), packed_batch(LENGTHS)
    reference_loss(plain, batch).backward()
    fields = {f"{slot}_implementation": MODULE_KERNELS[f"{slot}_implementation"] for slot in slots}
    binding = bind_reference_kernels(bound, monkeypatch, fields)
    mean_loss(binding, bound, batch).backward()
    binding.verify_called()
    assert worst_difference(gradients(bound), gradients(plain)) <= 1e-5
    rows = {row.field: row for row in binding.table}
    assert all(rows[field].is_bound and rows[field].num_places for field in fields)
    assert "forward" not in vars(plain.model.norm)  # the other instance is its class's


def test_gemma_multiplies_by_one_plus_its_weight():
    from omnilit.models.places import measure_rms_offset

    offsets = [measure_rms_offset(tiny(family).model.norm) for family in ("gemma3", "llama")]
    assert offsets == [1.0, 0.0]


def test_modules_are_measured_on_meta_too():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("qwen3").config)
    binding = bind_kernels(model, kernels_of())
    rows = {row[0]: row[2:4] for row in binding.rows()[1]}
    assert rows["rms_norm"] == (9, "bound")
    assert rows["swiglu_mlp"][1] == "the model's own code"
    assert rows["attention"] == (2, "bound")


def test_a_table_says_what_runs():
    binding = bind_kernels(tiny("qwen3_moe"), kernels_of(attn_implementation="sdpa"))
    rows = {row[0]: row[1:] for row in binding.rows()[1]}
    assert rows["attention"] == ("sdpa", 2, "bound", "given")
    assert rows["moe"][:3] == ("torch", 2, "bound")
    assert rows["swiglu_mlp"][1:3] == (0, "no place")
    assert rows["load_balancing_loss"][1:3] == (0, "no place")
    assert len(rows) == 10
    balanced = bind_kernels(tiny("qwen3_moe", output_router_logits=True), kernels_of())
    rows = {row[0]: row[1:] for row in balanced.rows()[1]}
    assert rows["load_balancing_loss"][:3] == ("eager", 1, "bound")


def test_the_loop_is_chosen_for_experts():
    model = tiny("qwen3_moe")
    assert model.config._experts_implementation == "grouped_mm"
    binding = bind_kernels(model, kernels_of(moe_implementation="eager"))
    assert model.config._experts_implementation == "eager"
    rows = {row[0]: row[1:] for row in binding.rows()[1]}
    assert rows["moe"][:3] == ("eager", 2, "the model's own code")


def test_a_given_backend_without_a_place_names_the_slots_there_are(monkeypatch):
    fields: dict[str, object] = {"moe_implementation": loop_over_experts}
    with pytest.raises(KernelError) as error:
        bind_reference_kernels(tiny("llama"), monkeypatch, fields)
    assert str(error.value) == (
        "model.ops_implementation.moe_implementation: 'mine' has no place in LlamaForCausalLM, "
        "whose slots are attention, cross_entropy_loss, rms_norm, swiglu_mlp, rotary_pos_emb. "
        "To fix: leave the field out, or set it to eager."
    )


def test_eager_needs_no_place():
    bind_kernels(tiny("llama"), kernels_of(moe_implementation="eager"))


def test_a_kernel_that_was_never_called_is_an_error():
    with pytest.raises(KernelError) as error:
        bind_kernels(tiny("llama"), kernels_of()).verify_called()
    assert "'sdpa' was bound in 2 places and never called" in str(error.value)
    assert "'chunk_loss' was bound in 1 places and never called" in str(error.value)


def test_a_model_that_mixes_tokens_otherwise_is_refused():
    model = tiny("llama")
    model.model.layers[0].conv = torch.nn.Conv1d(4, 4, 2)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.conv convolves along the sequence"):
        bind_kernels(model, kernels_of())
    model = tiny("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="its layers include linear_attention"):
        bind_kernels(model, kernels_of())


def test_a_model_that_does_not_hand_the_bounds_on_is_refused(monkeypatch):
    monkeypatch.setattr(PackedRun, "listen", lambda *_: None)  # as if its blocks did not get them
    model = tiny("stablelm")
    binding = bind_kernels(model, kernels_of())
    with pytest.raises(KernelError, match="StableLmAttention was not told where the sequences"):
        binding.head.forward(model, packed_batch(LENGTHS))
    model(input_ids=torch.zeros(1, 6, dtype=torch.long), use_cache=False)  # one sequence


def test_what_a_block_kept_is_of_its_last_row_alone():
    plain, model = tiny("stablelm"), tiny("stablelm")
    binding = bind_kernels(model, kernels_of())
    binding.head.forward(model, packed_batch(LENGTHS))
    ids = packed_batch((11,)).input_ids
    torch.testing.assert_close(
        model(input_ids=ids, use_cache=False).logits, plain(input_ids=ids, use_cache=False).logits
    )


def test_backward_of_an_earlier_row_has_its_own_bounds():
    plain, model = tiny("stablelm"), tiny("stablelm")
    binding = bind_kernels(model, kernels_of())
    model.activation_checkpointing_enable()
    rows = [packed_batch(LENGTHS), packed_batch(LENGTHS[::-1], seed=1)]
    losses = [mean_loss(binding, model, row) for row in rows]  # both before a block runs again
    sum(losses, torch.zeros(())).backward()
    for row in rows:
        reference_loss(plain, row).backward()
    assert worst_difference(gradients(model), gradients(plain)) <= 1e-5


def test_an_encoder_is_refused():
    with pytest.raises(ConfigError, match=r"its tokens see those behind them \(is_decoder: false"):
        bind_kernels(tiny("roberta", is_decoder=False), kernels_of())


def test_chunks_are_not_told_apart_in_a_cache():
    model: Any = tiny("llama4").eval()
    bind_kernels(model, kernels_of())
    ids = packed_batch((11,)).input_ids
    with pytest.raises(KernelError, match="cannot tell where they begin in a cache"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    plain = tiny("llama4").eval()
    logits = [m(input_ids=ids, use_cache=False).logits for m in (model, plain)]
    torch.testing.assert_close(*logits)


def test_a_model_that_counts_positions_itself_is_refused():
    config = hf.BartConfig(d_model=32, decoder_layers=1, decoder_attention_heads=2, vocab_size=64)
    model = hf.BartForCausalLM(config)
    with pytest.raises(ConfigError, match=r"BartForCausalLM .* takes no position_ids"):
        bind_kernels(model, kernels_of())


def test_bounds_that_do_not_fit_are_refused():
    model, ids = tiny("llama"), torch.zeros(1, 6, dtype=torch.long)
    bind_kernels(model, kernels_of())
    with pytest.raises(KernelError, match="bounds that end at 5 came with 1 rows of 6 queries"):
        model(input_ids=ids, cu_seq_lens_q=Segments([0, 5]), use_cache=False)
    with pytest.raises(KernelError, match="bounds that end at 6 came with 2 rows"):
        model(input_ids=ids.expand(2, 6), cu_seq_lens_q=Segments([0, 6]), use_cache=False)


def test_an_unbound_module_or_a_mask_is_refused():
    model = tiny("llama")
    bind_kernels(model, kernels_of())
    with pytest.raises(KernelError, match="LlamaAttention passes attention_mask"):
        model(
            input_ids=torch.zeros(1, 4, dtype=torch.long),
            attention_mask=torch.zeros(1, 1, 4, 4),
            use_cache=False,
        )
    del model.model.layers[0].self_attn.omnilit_attention
    with pytest.raises(KernelError, match="was not bound"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_padding_is_refused_since_it_would_leak():
    model, ids = tiny("llama"), torch.zeros(2, 4, dtype=torch.long)
    bind_kernels(model, kernels_of())
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(KernelError, match="LlamaForCausalLM was given a mask with padding"):
        model(input_ids=ids, attention_mask=mask)


def test_generation_with_a_cache_is_unchanged():
    for family in ("qwen3", "gemma3", "gpt_oss"):
        plain, bound = tiny(family).eval(), tiny(family).eval()
        bind_kernels(bound, kernels_of())
        ids = packed_batch((11,)).input_ids
        models: list[Any] = [plain, bound]
        made = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in models]
        assert torch.equal(*made)


def test_the_exported_config_knows_nothing_of_us(tmp_path):
    model = tiny("qwen3")
    bind_kernels(model, kernels_of())
    model.config.save_pretrained(tmp_path)
    assert "omnilit" not in (tmp_path / "config.json").read_text()


def test_deepcopy_keeps_the_binding():
    model, batch = tiny("qwen3"), packed_batch(LENGTHS)
    binding = bind_kernels(model, kernels_of())
    copied = copy.deepcopy(model)
    losses = [binding.head.forward(m, batch).token_losses for m in (model, copied)]
    assert torch.equal(*losses)
    assert copied.lm_head.forward.__self__ is copied.lm_head


def test_finders_and_binders_cover_the_same_slots():
    own = {"load_balancing_loss_implementation"}  # reads what leaves the model, as the head does
    own |= set(bind_module._DELTA_NET)  # bound together, with the state that both share
    assert bind_module._FINDERS.keys() == bind_module._BINDERS.keys() | own
