"""Where a model is built changes where its memory is, and nothing else."""

from __future__ import annotations

import logging

import pytest
import torch

from omnilit.errors import ConfigError
from omnilit.kernels.machine import why_absent
from omnilit.models.init_device import build_initial, check_init_device
from omnilit.models.weights import load_weights
from omnilit.parallel.materialize import named_tensors
from tests.helpers.models import tiny_config

CPU = torch.device("cpu")


def build(init_device, family="qwen3_tied"):
    return build_initial(
        tiny_config(family), init_device=init_device, trains_on="cpu", dtype=torch.bfloat16
    )


def test_the_model_takes_memory_where_it_is_built(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="omnilit"):
        devices = {p.device.type for p in build("meta").parameters()}
        assert not caplog.text
        model = build("cpu")
    assert devices == {"meta"}
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "init_device: cpu: each rank first holds the whole model" in caplog.text
    assert torch.get_rng_state().shape == state.shape


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe", "gpt_oss"])
def test_random_weights_are_the_same_to_the_bit(family):
    models = [build(init_device, family) for init_device in ("meta", "cpu")]
    for model in models:
        load_weights(model, tiny_config(family), path=None, seed=3, device=CPU)
    one, other = (named_tensors(model) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_device_of_this_run_or_none_at_all_is_good():
    assert not check_init_device("meta", trains_on="cuda")
    assert not check_init_device("cpu", trains_on="cuda")
    assert not check_init_device("cuda", trains_on="cuda")
    assert not check_init_device("npu", trains_on="npu")


@pytest.mark.parametrize("init_device", ["cuda", "npu"])
def test_another_device_is_refused_with_all_that_speaks_against_it(init_device):
    (problem,) = check_init_device(init_device, trains_on="cpu")
    reasons = ["this run trains on cpu", *why_absent(init_device)]
    assert problem.key == "train.init_device"
    assert problem.problem == f"no model can be built on {init_device}: {', and '.join(reasons)}"
    assert problem.fix.startswith("leave it out for meta")
    with pytest.raises(ConfigError, match=f"built on {init_device}: this run trains on cpu"):
        build(init_device)


def test_what_is_absent_is_said_by_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_absent("cuda") == [f"torch {torch.__version__} is built without CUDA"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert why_absent("cuda") == ["torch finds no CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not why_absent("cuda")
    assert not why_absent("cpu")
