from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from omnilit.config.optimizer_rules import HIGHEST_BETA
from omnilit.optim import anyprecision
from omnilit.optim.anyprecision import AnyPrecisionAdamW

BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS = {"lr": 0.01, "betas": (0.8, 0.6), "eps": 1e-3, "weight_decay": 0.5}


def rounded(value: float) -> float:
    return torch.tensor(value, dtype=BF16).item()


def one_weight(value: float, dtype: torch.dtype = FP32) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=dtype))


def give(parameter: nn.Parameter, gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, gradient)


def test_three_steps_are_those_of_the_paper_with_rounded_averages():
    w, m, v, lr = 2.0, 0.0, 0.0, 0.01
    parameter = one_weight(w)
    optimizer = AnyPrecisionAdamW([parameter], **SETTINGS)
    for t, g in enumerate((3.0, -1.7, 0.3), start=1):
        give(parameter, g)
        optimizer.step()
        w -= lr * 0.5 * w  # decoupled decay, before the update
        m, v = 0.8 * m + 0.2 * g, 0.6 * v + 0.4 * g * g
        w -= lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.6**t)) ** 0.5 + 1e-3)
        m, v = rounded(m), rounded(v)  # what the next step finds
        state = optimizer.state[parameter]
        assert parameter.item() == pytest.approx(w, rel=1e-6)
        assert (state["exp_avg"].item(), state["exp_avg_sq"].item()) == (m, v)
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == BF16
        assert state["step"].item() == t


def test_kahan_keeps_what_a_bfloat16_weight_rounds_off():
    parameter = one_weight(1.0, BF16)
    optimizer = AnyPrecisionAdamW(
        [parameter], lr=1e-3, betas=(0.0, 0.0), eps=1e-8, use_kahan_summation=True
    )
    weight, carry = 1.0, 0.0
    for _ in range(5):  # with betas 0 each step is -lr * sign(gradient), a quarter of an ulp here
        give(parameter, 1.0)
        optimizer.step()
        exact = weight + carry - 1e-3
        weight = rounded(exact)
        carry = rounded(exact - weight)
        assert parameter.item() == weight
        assert optimizer.state[parameter]["compensation"].item() == pytest.approx(carry, rel=1e-2)
    assert weight == 1 - 2**-8  # 0.995 is nearer to it than to 1


def draw_steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (noise + 0.5).to(parameter.dtype)
        optimizer.step()


def test_a_large_tensor_is_widened_in_pieces(monkeypatch):
    sizes, plain_update = [], anyprecision._update

    def update(parts, group):
        sizes.append(sum(part.weight.numel() for part in parts))
        plain_update(parts, group)

    monkeypatch.setattr(anyprecision, "_update", update)
    ends = []
    for bucket in (16, 1000):
        monkeypatch.setattr(anyprecision, "BUCKET", bucket)
        parameters = [nn.Parameter(torch.linspace(1, 2, n).to(BF16)) for n in (50, 3)]
        optimizer = AnyPrecisionAdamW(parameters, **SETTINGS, use_kahan_summation=True)
        for step in range(3):
            for parameter in parameters:
                give(parameter, 1.0 + step)
            optimizer.step()
        ends.append([parameter.detach() for parameter in parameters])
        assert {state["step"].item() for state in optimizer.state.values()} == {3.0}
    assert sizes == [16, 16, 16, 5] * 3 + [53] * 3
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize("fused", [True, None])
def test_with_float32_averages_it_is_torchs_adamw_to_the_bit(fused, monkeypatch):
    monkeypatch.setattr(anyprecision, "BUCKET", 40)  # several buckets, and tensors in pieces
    ours, theirs = (nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    draw_steps(
        ours,
        AnyPrecisionAdamW(ours.parameters(), **SETTINGS, moment_dtype=FP32, fused=fused),
        20,
    )
    draw_steps(theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS, fused=fused), 20)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_bfloat16_averages_stay_near_float32_ones():
    models = [nn.Linear(50, 40) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = models[0].weight.detach().clone()
    settings = {"lr": 1e-3, "betas": (0.9, 0.95)}
    rounding = AnyPrecisionAdamW(models[0].parameters(), **settings)
    exact = torch.optim.AdamW(models[1].parameters(), **settings, weight_decay=0.0)
    for model, optimizer in zip(models, (rounding, exact), strict=True):
        draw_steps(model, optimizer, 100)
    moved = (models[1].weight - start).abs().mean()
    apart = (models[0].weight - models[1].weight).abs()
    # An average is rounded by at most 2**-9 of itself a step, and forgets old roundings as fast
    # as old gradients: 2**-9 / (1 - beta) of its largest value, 2 % for the first and 4 % for the
    # second, whose root counts half. So a step of lr is off by 4 % at most, by far less in the
    # mean, where roundings go both ways.
    assert 0 < apart.max() <= 100 * 1e-3 * 0.04
    assert apart.mean() <= 0.01 * moved


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_kahan_bfloat16_weights_follow_float32_ones_and_stall_without(decay):
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": decay}
    start = torch.linspace(0.5, 1.5, 101).to(BF16)
    ends = {}
    for name, dtype in (("fp32", FP32), ("plain", BF16), ("kahan", BF16)):
        use_kahan = name == "kahan"
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer = AnyPrecisionAdamW([parameter], **settings, use_kahan_summation=use_kahan)
        for _ in range(300):
            give(parameter, 1.0)
            optimizer.step()
        carry = optimizer.state[parameter].get("compensation")
        ends[name] = parameter.detach().float() + (carry.float() if carry is not None else 0.0)
        if use_kahan:
            # the weight alone is its nearest bfloat16, half a unit in the last place away
            assert ((parameter - ends["fp32"]).abs() <= 2**-8 * ends["fp32"]).all()
    moved = start.float() - ends["fp32"]
    assert moved.min() > 0.029  # 300 steps of 1e-4, and the decay
    assert torch.equal(ends["plain"], start.float())
    # weight and carry hold 16 bits: a step loses at most 2**-17 of the weight, 300 steps 0.3 %
    assert ((ends["kahan"] - ends["fp32"]).abs() <= 300 * 2**-17 * start.float()).all()
    assert ((ends["kahan"] - ends["fp32"]).abs() <= 0.1 * moved).all()


def test_a_parameter_without_a_gradient_stays_with_its_averages():
    moving, resting = one_weight(1.0), one_weight(1.0)
    optimizer = AnyPrecisionAdamW([moving, resting], **SETTINGS)
    for parameter in (moving, resting):
        give(parameter, 2.0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[resting])
    weight = resting.item()
    give(moving, 1.0)
    resting.grad = None
    optimizer.step()
    assert resting.item() == weight
    assert all(torch.equal(before[name], optimizer.state[resting][name]) for name in before)
    assert optimizer.state[moving]["step"].item() == 2


def test_a_closure_computes_gradients_and_its_loss_is_returned():
    parameter = one_weight(3.0)
    optimizer = AnyPrecisionAdamW([parameter], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert parameter.item() == pytest.approx(2.9)


@pytest.mark.parametrize("use_kahan", [True, False])
def test_torchs_own_state_dict_goes_on_to_the_bit(use_kahan):
    settings = {**SETTINGS, "use_kahan_summation": use_kahan}
    whole, resumed = one_weight(1.3), one_weight(1.3)
    first = AnyPrecisionAdamW([whole], **settings)
    give(whole, 0.7)
    first.step()
    resumed.data.copy_(whole.data)
    second = AnyPrecisionAdamW([resumed], **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parameter, optimizer in ((whole, first), (resumed, second)):
        give(parameter, -0.2)
        optimizer.step()
    assert torch.equal(whole, resumed)
    dtypes = {name: value.dtype for name, value in second.state[resumed].items()}
    assert dtypes.pop("step") == FP32
    assert set(dtypes.values()) == {BF16}


def test_what_kahan_kept_goes_when_it_is_turned_off():
    parameter = one_weight(1.0, BF16)
    optimizer = AnyPrecisionAdamW([parameter], use_kahan_summation=True)
    give(parameter, 1.0)
    optimizer.step()
    optimizer.param_groups[0]["use_kahan_summation"] = False
    optimizer.step()
    assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_the_highest_beta_is_the_last_that_lets_a_bfloat16_average_fall():
    numbers = torch.arange(128).add(128).div(128).to(BF16)  # every mantissa
    assert (numbers.float().mul(HIGHEST_BETA).to(BF16) < numbers).all()
    assert (numbers.float().mul(0.9975).to(BF16) == numbers).any()
