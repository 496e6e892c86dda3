from dataclasses import replace

import pytest
import torch
from torch import nn

from omnilit.config import OptimizerConfig
from omnilit.errors import ConfigError
from omnilit.optim.build import build_optimizer

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.6), eps=1e-3)


def test_two_steps_are_those_of_the_paper():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(model, CONFIG)
    gradients, w, m, v = [3.0, -1.0], 2.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        model.weight.grad = torch.full((1, 1), g)
        optimizer.step()
        w -= 0.1 * 0.5 * w  # decoupled decay, before the update
        m, v = 0.8 * m + 0.2 * g, 0.6 * v + 0.4 * g * g
        m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.6**t)
        w -= 0.1 * m_hat / (v_hat**0.5 + 1e-3)
        assert model.weight.item() == pytest.approx(w, rel=1e-6)


def test_one_fused_kernel_updates_on_a_cpu():
    assert build_optimizer(nn.Linear(2, 2), CONFIG).defaults["fused"] is True


def test_groups_carry_their_decay_and_name():
    optimizer = build_optimizer(nn.Linear(2, 2), replace(CONFIG, no_decay_params=["bias"]))
    found = [(g["name"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups]
    assert found == [("backbone", 0.5, 0.1), ("backbone/no_decay", 0.0, 0.1)]


def test_anyprecision_keeps_bfloat16_moments_and_what_rounding_takes_when_asked():
    model = nn.Linear(2, 2).bfloat16()
    for use_kahan, kept in ((False, set()), (True, {"compensation"})):
        settings = replace(CONFIG, type="anyprecision_adamw", use_kahan_summation=use_kahan)
        optimizer = build_optimizer(model, settings)
        assert optimizer.defaults["fused"] is True
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.6), 1e-3)
        model(torch.ones(2, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        state = optimizer.state[model.weight]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} | kept
        assert state["exp_avg"].dtype == torch.bfloat16


def test_settings_that_do_not_fit_the_type_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="type: adamw has no Kahan summation"):
        build_optimizer(model, replace(CONFIG, use_kahan_summation=True))
    kahan = replace(CONFIG, type="anyprecision_adamw", use_kahan_summation=True)
    with pytest.raises(ConfigError, match="master_dtype: float32 are stored as they are computed"):
        build_optimizer(model, kahan)
    with pytest.raises(ConfigError, match="average that could never fall"):
        build_optimizer(model, replace(CONFIG, type="anyprecision_adamw", betas=(0.9, 0.999)))
