from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError
from omnilit.kernels.cross_entropy import chunk_loss, chunked, eager
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import changed_fields, resolve_kernels
from omnilit.models.attention import PackedRun
from omnilit.models.bind import bind_kernels
from omnilit.models.calls import CallCounter
from omnilit.models.head import HeadLoss
from omnilit.models.head_form import HeadForm, Setting, classify_forward, refuse_wrapper
from omnilit.types import IGNORE
from tests.helpers.models import (
    gradients,
    packed_batch,
    reference_loss,
    tiny,
    tiny_config,
    worst_difference,
)

LENGTHS = (7, 12, 3)


def in_chunks(hidden, weight, targets, *, bias_V=None, softcap=None):  # noqa: N803
    return chunked(hidden, weight, targets, bias_V, softcap, 4)


def bound(family, kernel=None, **over):
    model = tiny(family, **over)
    ops = OpsImplementationConfig()
    binding = bind_kernels(
        model, resolve_kernels(ops, given=changed_fields(ops), machine=Machine("cpu"))
    )
    assert isinstance(binding.head, HeadLoss)
    if kernel is not None:
        binding.head._kernel = kernel
    return model, binding.head


@pytest.mark.parametrize("kernel", [eager, chunk_loss, in_chunks])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "gemma2", "cohere", "granite"])
def test_the_head_computes_the_loss_of_the_full_model(family, kernel):
    plain, batch = tiny(family), packed_batch(LENGTHS)
    expected = reference_loss(plain, batch)
    expected.backward()
    model, head = bound(family, kernel)
    losses = head.forward(model, batch).token_losses
    assert losses.shape == (batch.counts["tokens"],)
    assert losses.dtype == torch.float32
    loss = losses.sum() / batch.counts["tokens"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert worst_difference(gradients(model), gradients(plain)) <= 1e-5


def test_a_head_inside_of_another_module_computes_the_loss():
    plain, batch = tiny("roberta"), packed_batch(LENGTHS)
    expected = reference_loss(plain, batch)
    expected.backward()
    model, head = bound("roberta")
    loss = head.forward(model, batch).token_losses.sum() / batch.counts["tokens"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    trained = [  # the same bias on all keys moves no weight: rounding alone
        {name: grad for name, grad in gradients(m).items() if not name.endswith("key.bias")}
        for m in (model, plain)
    ]
    assert worst_difference(*trained) <= 1e-5


def test_token_losses_keep_the_order_of_the_tokens():
    batch = packed_batch((9,))
    logits = tiny("llama")(input_ids=batch.input_ids, use_cache=False).logits[0]
    model, head = bound("llama")
    is_supervised = batch.labels[0] != IGNORE
    expected = cross_entropy(logits, batch.labels[0], reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(head.forward(model, batch).token_losses, expected[is_supervised])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "gemma2"])
@pytest.mark.parametrize("kernel", [eager, in_chunks])
def test_nothing_supervised_runs_the_model_and_gives_zero_gradients(family, kernel):
    model, head = bound(family, kernel)
    batch = packed_batch(LENGTHS, keep=0.0)
    loss = head.forward(model, batch).token_losses.sum()
    loss.backward()
    found = gradients(model)
    assert loss.item() == 0
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.eq(0).all() for gradient in found.values())


def test_logits_are_as_ever_outside_of_the_loss():
    batch = packed_batch((8,))
    for family in ("gemma2", "cohere", "granite"):
        plain, (model, head) = tiny(family), bound(family)
        head.forward(model, batch)
        logits = [m(input_ids=batch.input_ids, use_cache=False).logits for m in (plain, model)]
        torch.testing.assert_close(*logits)


def test_the_cap_stays_in_the_configuration_also_after_an_error():
    model, head = bound("gemma2")
    cap, batch = model.config.final_logit_softcapping, packed_batch(LENGTHS)
    assert cap
    head.forward(model, batch)
    assert model.config.final_logit_softcapping == cap
    broken = replace(batch, input_ids=batch.input_ids + 10_000)
    with pytest.raises(IndexError):
        head.forward(model, broken)
    assert model.config.final_logit_softcapping == cap
    assert model(input_ids=batch.input_ids, use_cache=False).logits.shape[-1] == 256


def test_a_balance_loss_without_a_coefficient_is_refused():
    model = tiny("llama", output_router_logits=True)
    with pytest.raises(ConfigError, match="output_router_logits without a router_aux_loss_coef"):
        bind_head(model)


def test_a_head_that_is_no_linear_layer_is_refused():
    model = tiny("llama")
    model.lm_head = nn.Sequential(nn.Linear(64, 256))
    with pytest.raises(ConfigError, match="output embeddings of LlamaForCausalLM are Sequential"):
        bind_head(model)


def test_a_cap_that_the_configuration_may_not_be_without_is_taken_out_too():
    class Config:
        cap = 3.0

        def __setattr__(self, name: str, value: float) -> None:
            raise TypeError(f"{name} is a float")

    model = nn.Module()
    vars(model)["config"] = Config()
    cap = Setting(("config",), "cap")
    with cap.replaced(model, None):
        assert cap.value(model) is None
    assert cap.value(model) == 3.0


def test_a_model_that_touches_its_logits_is_refused_with_the_line():
    class Halved(hf.LlamaForCausalLM):
        def forward(self, input_ids, logits_to_keep=0, **more):  # pyright: ignore[reportIncompatibleMethodOverride]
            logits = self.lm_head(self.model(input_ids, **more).last_hidden_state)
            logits = logits - logits.mean()
            return CausalLMOutput(logits=logits)

    with pytest.raises(ConfigError) as error:
        bind_head(Halved(cast("hf.LlamaConfig", tiny_config("llama"))))
    assert str(error.value) == (
        "model.config_path: the loss of Halved cannot be computed in its head: it touches the "
        "logits after the head (logits = logits - logits.mean()). To fix: choose an architecture "
        "that leaves the logits of its head alone."
    )


def test_a_factor_that_is_trained_is_refused():
    model = tiny("cohere")
    model.logit_scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="multiplies the logits by logit_scale, which is trained"):
        bind_head(model)


def bind_head(model) -> HeadLoss:
    return HeadLoss.bind(model, eager, counter=CallCounter(), run=PackedRun())


def classified(body: str, arguments: str = "logits_to_keep=0, labels=None") -> HeadForm:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    forward = ast.parse(f"def forward(self, {arguments}):\n{lines}").body[0]
    assert isinstance(forward, ast.FunctionDef)
    return classify_forward(forward, "lm_head")


CAP = """logits = self.lm_head(x)
if self.config.cap is not None:
    logits = logits / self.config.cap
    logits = torch.tanh(logits)
    logits = logits * self.config.cap
"""
NAMED_CAP = """logits = self.lm_head(x)
if (cap := self.config.get_text_config().cap) is not None:
    logits = logits / cap
    logits = torch.tanh(logits)
    logits = logits * cap
"""
CONFIG_CAP = Setting(("config",), "cap")
GUARDED = """logits = self.lm_head(x)
if labels is not None:
    loss = self.loss_function(logits.float(), labels)
return Out(logits=logits)
"""
WITH_TUPLE = """logits = self.lm_head(x)
if not return_dict:
    output = (logits,) + y[1:]
    return output
return Out(loss=loss, logits=logits)
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("logits = self.lm_head(x)\nreturn Out(logits=logits)", HeadForm()),
        ("logits = self.lm_head(x).float()\nreturn (logits,)", HeadForm()),
        (CAP + "return Out(logits=logits)", HeadForm(CONFIG_CAP)),
        (NAMED_CAP, HeadForm(Setting(("config", "get_text_config()"), "cap"))),
        (
            "logits = self.lm_head(x)\nlogits = logits / self.config.cap",
            HeadForm(None, CONFIG_CAP, True),
        ),
        (
            "logits = self.lm_head(x) * self.cap\nreturn Out(logits=logits)",
            HeadForm(None, Setting((), "cap")),
        ),
        (CAP.replace("(x)", "(x) * self.config.cap"), HeadForm(CONFIG_CAP, CONFIG_CAP)),
        (GUARDED, HeadForm()),
        (WITH_TUPLE, HeadForm()),
    ],
)
def test_forwards_that_leave_the_logits_alone(body, expected):
    assert classified(body) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("logits = self.lm_head(x) * 2", "touches the logits"),
        ("logits = self.lm_head(x) + self.config.shift", "touches the logits"),
        (CAP + "logits = logits * self.scale", "touches the logits"),
        (CAP + CAP[25:], "touches the logits"),
        ("logits = self.lm_head(x)\nlogits = logits * self.a\nlogits = logits * self.b", "touches"),
        ("logits = self.lm_head(x)\nlogits = logits * self.f(x)", "touches the logits"),
        ("logits = self.lm_head(x)\nlogits *= 2", "touches the logits"),
        ("logits = self.lm_head(x)\nlogits[..., 3] = 0", "touches the logits"),
        ("logits = self.lm_head(x)\nif flag:\n    logits = logits * 2", "touches the logits"),
        ("logits = self.lm_head(x)\nif labels is None:\n    y = g(logits)", "touches the logits"),
        ("logits = self.cls(x)", "self.lm_head is never called"),
        ("a = self.lm_head(x)\nb = self.lm_head(y)", "not simply assigned"),
        ("logits = self.lm_head(x)\nreturn Out(logits=logits * 2)", "touches the logits"),
        ("logits = self.lm_head(x)\nother = logits\nreturn other", "touches the logits"),
        ("logits = self.lm_head(x)\nreturn Out(logits=logits, z=(logits * 2,))", "touches"),
        (CAP.replace("/", "-"), "touches the logits"),
        (CAP.replace("is not None", "is None"), "touches the logits"),
    ],
)
def test_forwards_that_touch_the_logits(body, reason):
    assert reason in classified(body).refusal


def test_a_forward_without_logits_to_keep_is_refused():
    assert classified("logits = self.lm_head(x)", "labels").refusal == (
        "its forward has no logits_to_keep"
    )


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("llama", True),
        ("qwen2", True),
        ("qwen3", True),
        ("qwen3_moe", True),
        ("gpt_oss", True),
        ("deepseek_v3", True),
        ("gemma2", True),
        ("gemma3", True),
        ("mistral", True),
        ("glm4_moe", True),
        ("granite", True),
        ("cohere2", True),
        ("recurrent_gemma", False),
    ],
)
def test_installed_architectures_are_classified(module, expected):
    package = Path(inspect.getfile(hf)).parent
    tree = ast.parse((package / "models" / module / f"modeling_{module}.py").read_text())
    forwards = [
        item
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("ForCausalLM")
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name == "forward"
    ]
    assert len(forwards) == 1
    assert bool(classify_forward(forwards[0], "lm_head").refusal) is not expected


def parsed(body: str) -> ast.FunctionDef:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    forward = ast.parse(f"def forward(self, x):\n{lines}").body[0]
    assert isinstance(forward, ast.FunctionDef)
    return forward


@pytest.mark.parametrize(
    ("body", "is_fine"),
    [
        ("x = self.dense(x)\nx = self.decoder(x)\nreturn x", True),
        ("return self.decoder(self.dense(x))", True),
        ("x = self.decoder(x) + self.bias\nreturn x", False),
        ("x = self.decoder(x)\nx = x * 2\nreturn x", False),
        ("y = self.decoder(x)\nreturn x", False),
        ("x = self.decoder(self.decoder(x))\nreturn x", False),
        ("return self.other(x)", False),
    ],
)
def test_what_is_around_a_head_may_work_before_it_only(body, is_fine):
    assert (refuse_wrapper(parsed(body), "decoder") == "") is is_fine
