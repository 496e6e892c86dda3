from dataclasses import replace

import pytest
import torch
from torch import nn

from omnilit.config import OptimizerConfig
from omnilit.errors import ConfigError
from omnilit.optim.schedules import AbsoluteSchedule, lr_at

CONFIG = OptimizerConfig(lr=1.0, lr_min=0.2, lr_start=0.1, lr_warmup_ratio=0.2)


def rates(style, steps, **changes):
    config = replace(CONFIG, lr_decay_style=style, **changes)
    return [lr_at(step, total=20, config=config, lr=1.0) for step in steps]


def test_warmup_climbs_from_lr_start_by_equal_parts():
    expected = [0.1, 0.325, 0.55, 0.775, 1.0]
    for style in ("constant", "linear", "cosine"):
        assert rates(style, range(5)) == pytest.approx(expected)


def test_constant_stays():
    assert rates("constant", [4, 12, 20, 99]) == [1.0] * 4


def test_linear_falls_to_lr_min_and_stays_there():
    assert rates("linear", [4, 12, 20, 99]) == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_cosine_passes_the_middle_and_a_quarter():
    middle, quarter = 0.6, 0.6 + 0.4 * 0.5**0.5
    assert rates("cosine", [4, 8, 12, 20, 99]) == pytest.approx([1.0, quarter, middle, 0.2, 0.2])


def test_the_decay_ends_at_its_share_of_all_steps():
    assert rates("linear", [4, 7, 10, 20], lr_decay_ratio=0.5) == pytest.approx([1, 0.6, 0.2, 0.2])


def test_a_decay_that_ends_within_the_warmup_jumps_to_lr_min():
    assert rates("cosine", [3, 4, 5], lr_decay_ratio=0.1) == pytest.approx([0.775, 0.2, 0.2])


def test_without_warmup_the_first_step_has_the_full_rate():
    assert rates("linear", [0], lr_warmup_ratio=0.0) == [1.0]


def test_an_unknown_style_is_refused():
    with pytest.raises(ConfigError, match=r"lr_decay_style: 'cosin' .* mean 'cosine'"):
        rates("cosin", [0])


def schedule(total_steps=20, lrs=(1.0, 0.0), style="linear"):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.AdamW(groups)
    config = replace(CONFIG, lr_decay_style=style, lr_min=0.0, lr_start=0.0)
    return optimizer, AbsoluteSchedule(optimizer, config, total_steps=total_steps)


def lrs_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_each_group_follows_its_own_rate_and_zero_stays_zero():
    optimizer, plan = schedule()
    seen = [lrs_of(optimizer)]
    for _ in range(12):
        plan.step()
        seen.append(lrs_of(optimizer))
    assert seen[0] == [0.0, 0.0]
    assert seen[4] == [1.0, 0.0]
    assert seen[12] == pytest.approx([0.5, 0.0])
    assert plan.get_last_lr() == seen[12]


def test_a_restored_schedule_takes_the_step_and_the_new_length():
    _, plan = schedule(total_steps=20)
    for _ in range(12):
        plan.step()
    optimizer, longer = schedule(total_steps=40)
    longer.load_state_dict(plan.state_dict())
    assert lrs_of(optimizer) == pytest.approx([1 - (12 - 8) / 32, 0.0])
    longer.step()
    assert lrs_of(optimizer) == pytest.approx([1 - (13 - 8) / 32, 0.0])


def test_the_state_is_the_step_alone():
    assert schedule()[1].state_dict() == {"step": 0}
