"""Classifiers on packed rows beside transformers, one text at a time."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError, KernelError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import changed_fields, resolve_kernels
from omnilit.models.bind import Binding, bind_kernels
from omnilit.models.build import build_meta
from omnilit.models.class_labels import as_classifier
from omnilit.models.fit import ModelNumbers
from omnilit.models.flops import count_flops
from omnilit.models.heads import output_head
from omnilit.models.stages import CutPlan, find_uncut
from omnilit.types import IGNORE, MicroBatch
from tests.helpers.models import gradients, packed_batch, tiny_config, worst_difference

NAMES = ("good", "bad", "so so")
LENGTHS = (3, 1, 7, 5)
FAMILIES = ("qwen3", "qwen3_tied", "llama", "qwen3_moe", "gemma3", "gemma2", "phi", "gpt_oss")


def classifier(family: str, **over: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = as_classifier(tiny_config(family, **over), label_names=NAMES)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")


def bound(model: PreTrainedModel, ops: OpsImplementationConfig | None = None) -> Binding:
    ops = ops or OpsImplementationConfig()
    kernels = resolve_kernels(ops, given=changed_fields(ops), machine=Machine("cpu"))
    return bind_kernels(model, kernels)


def labelled(lengths: tuple[int, ...] = LENGTHS) -> MicroBatch:
    """Texts whose last token has a class; the second text is that one token."""
    batch = packed_batch(lengths)
    labels = torch.full_like(batch.labels, IGNORE)
    labels[0, [end - 1 for end in batch.bounds[1:]]] = torch.arange(len(lengths)) % len(NAMES)
    return replace(batch, labels=labels, counts={"tokens": len(lengths)})


def one_by_one(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The logits of each text by transformers alone, [R, C]."""
    bounds = zip(batch.bounds, batch.bounds[1:], strict=False)
    rows = [model(input_ids=batch.input_ids[:, a:b], use_cache=False).logits for a, b in bounds]
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_the_logits_and_gradients_of_its_texts(family):
    plain, model, batch = classifier(family), classifier(family), labelled()
    expected = one_by_one(plain, batch)
    labels = batch.labels[batch.labels != IGNORE]
    torch.nn.functional.cross_entropy(expected, labels).backward()
    output = bound(model).forward(model, batch)
    assert output.class_logits is not None
    assert torch.allclose(output.class_logits, expected, atol=1e-5)
    output.token_losses.mean().backward()
    assert worst_difference(gradients(model), gradients(plain)) < 1e-4


def test_padding_inside_a_text_or_behind_the_row_is_not_mistaken_for_its_end():
    model, batch = classifier("qwen3"), labelled()
    ids = batch.input_ids.clone()
    ids[0, 2] = model.config.pad_token_id  # the last token of the first text
    batch = replace(batch, input_ids=ids)
    # transformers itself would take the token before it
    short = model(input_ids=ids[:, :3], use_cache=False).logits
    model.config.pad_token_id = None
    expected = one_by_one(model, batch)
    model.config.pad_token_id = 0
    found = bound(model).forward(model, batch).class_logits
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found[:1], short, atol=1e-3)
    assert model.config.pad_token_id == 0


def test_a_row_without_labels_has_gradients_that_are_zero():
    model, batch = classifier("qwen3"), labelled()
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    output = bound(model).forward(model, empty)
    assert output.token_losses.shape == (0,)
    output.token_losses.sum().backward()
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_outside_of_packed_rows_the_model_is_as_ever():
    plain, model, batch = classifier("qwen3"), classifier("qwen3"), labelled((5,))
    bound(model).forward(model, batch)
    assert torch.allclose(one_by_one(model, batch), one_by_one(plain, batch), atol=1e-5)


def test_a_head_that_sees_another_token_is_refused():
    with pytest.raises(ConfigError, match="RobertaForSequenceClassification does not classify a"):
        bound(classifier("roberta"))


def test_code_that_does_more_with_the_last_place_is_refused(monkeypatch):
    model = classifier("qwen3")
    forward = type(model).forward

    @functools.wraps(forward)
    def doubled(self, **given) -> SequenceClassifierOutputWithPast:
        output = forward(self, **given)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(ConfigError, match="by a linear layer on its last token"):
        bound(model)


def test_a_kernel_for_a_loss_over_the_vocabulary_has_no_place():
    ops = OpsImplementationConfig(cross_entropy_loss_implementation="chunk_loss")
    with pytest.raises(KernelError, match="'chunk_loss' has no place in Qwen3ForSequenceClass"):
        bound(classifier("qwen3"), ops)
    (row,) = [r for r in bound(classifier("qwen3")).rows()[1] if r[0] == "cross_entropy_loss"]
    assert row[2:4] == (0, "no place")


def test_the_head_is_found_and_counted():
    config = as_classifier(tiny_config("qwen3_tied"), num_labels=5)
    model = build_meta(config, dtype=torch.float32)
    head = output_head(model)
    assert head is model.get_submodule("score")
    flops = count_flops(model)
    assert flops is not None
    assert flops.per_target == 2 * 5 * 64
    assert not ModelNumbers.of(config).is_tied


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "llama", "qwen3_moe", "gemma3"])
def test_a_classifier_is_cut_into_stages_with_its_head_on_the_last(family):
    model = classifier(family)
    assert not find_uncut(model)
    assert CutPlan.of(model).last == ("model.norm", "score")


def test_the_balance_loss_is_that_of_the_language_model():
    model, batch = classifier("qwen3_moe", output_router_logits=True), labelled()
    output = bound(model).forward(model, batch)
    assert output.balance is not None
    assert output.balance > 0
