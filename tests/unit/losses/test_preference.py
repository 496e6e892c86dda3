import math

import pytest
import torch

from omnilit.config import DPOConfig
from omnilit.losses.preference import PairScores, needs_reference, pair_losses, pair_metrics
from omnilit.losses.segments import sum_by_segment
from omnilit.types import IGNORE, MicroBatch

POLICY = PairScores(torch.tensor([-3.0, -8.0]), torch.tensor([-5.0, -2.0]))
REFERENCE = PairScores(torch.tensor([-4.0, -7.0]), torch.tensor([-4.5, -3.0]))
MARGINS = (2.0 - 0.5, -6.0 + 4.0)  # of the policy less those of the reference


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (DPOConfig(beta=0.3), lambda h: -log_sigmoid(0.3 * h)),
        (
            DPOConfig(beta=0.3, label_smoothing=0.2),
            lambda h: -0.8 * log_sigmoid(0.3 * h) - 0.2 * log_sigmoid(-0.3 * h),
        ),
        (DPOConfig(beta=0.3, loss_type="ipo"), lambda h: (h - 1 / 0.6) ** 2),
        (DPOConfig(beta=0.3, loss_type="hinge"), lambda h: max(0.0, 1 - 0.3 * h)),
        (
            DPOConfig(beta=0.3, loss_type="robust", label_smoothing=0.2),
            lambda h: (-0.8 * log_sigmoid(0.3 * h) + 0.2 * log_sigmoid(-0.3 * h)) / 0.6,
        ),
    ],
)
def test_losses_with_a_reference_are_their_formulas(config, value):
    expected = torch.tensor([value(h) for h in MARGINS])
    torch.testing.assert_close(pair_losses(POLICY, REFERENCE, config), expected)
    free = torch.tensor([value(2.0), value(-6.0)])
    torch.testing.assert_close(pair_losses(POLICY, None, config), free)


def test_the_robust_loss_has_the_expectation_of_the_loss_on_right_labels():
    wrong = 0.2
    robust = DPOConfig(beta=0.3, loss_type="robust", label_smoothing=wrong)
    policy, reference = (PairScores(s.rejected, s.chosen) for s in (POLICY, REFERENCE))
    right, other = pair_losses(POLICY, REFERENCE, robust), pair_losses(policy, reference, robust)
    mean = (1 - wrong) * right + wrong * other
    torch.testing.assert_close(mean, pair_losses(POLICY, REFERENCE, DPOConfig(beta=0.3)))


def test_losses_without_a_reference_are_their_formulas():
    means = PairScores(torch.tensor([-0.5]), torch.tensor([-2.0]))
    simpo = pair_losses(means, None, DPOConfig(beta=2.0, loss_type="simpo", simpo_gamma=0.7))
    assert simpo.item() == pytest.approx(-log_sigmoid(2.0 * 1.5 - 0.7))
    orpo = pair_losses(means, None, DPOConfig(beta=0.4, loss_type="orpo"))
    odds = [math.exp(p) / (1 - math.exp(p)) for p in (-0.5, -2.0)]
    expected = 0.5 - 0.4 * log_sigmoid(math.log(odds[0]) - math.log(odds[1]))
    assert orpo.item() == pytest.approx(expected)


def test_an_identical_reference_gives_the_values_of_step_zero():
    for config, value in (
        (DPOConfig(), math.log(2)),
        (DPOConfig(loss_type="ipo", beta=0.25), 1 / (4 * 0.25**2)),
        (DPOConfig(loss_type="hinge"), 1.0),
    ):
        assert pair_losses(POLICY, POLICY, config).tolist() == pytest.approx([value] * 2)
        shown = pair_metrics(POLICY, POLICY, config)
        assert shown["rewards/margins"].tolist() == [0.0, 0.0]
        assert shown["rewards/accuracies"].tolist() == [0.0, 0.0]


def test_rewards_are_beta_times_what_the_policy_gained():
    shown = pair_metrics(POLICY, REFERENCE, DPOConfig(beta=0.5))
    assert shown["rewards/chosen"].tolist() == [0.5, -0.5]
    assert shown["rewards/rejected"].tolist() == [-0.25, 0.5]
    assert shown["rewards/margins"].tolist() == [0.75, -1.0]
    assert shown["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert shown["logps/chosen"].tolist() == [-3.0, -8.0]


def test_which_losses_have_a_reference():
    assert needs_reference(DPOConfig())
    assert not needs_reference(DPOConfig(reference_free=True))
    assert not needs_reference(DPOConfig(loss_type="orpo"))
    assert not needs_reference(DPOConfig(loss_type="simpo"))


def test_values_are_added_up_by_segment_also_where_a_rank_holds_a_part():
    labels = torch.tensor([[IGNORE, 5, IGNORE, 6, 7, IGNORE, IGNORE, 8, IGNORE]])
    whole = MicroBatch(labels, labels, labels, [0, 3, 6, 9], (), {})
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert sum_by_segment(values, whole).tolist() == [1.0, 5.0, 4.0]
    index = torch.tensor([[4, 5, 6, 7, 8]])
    own = labels[:, 4:]
    part = MicroBatch(own, own, own, [0, 3, 6, 9], (), {}, row_index=index)
    assert sum_by_segment(values[2:], part).tolist() == [0.0, 3.0, 4.0]


def test_a_long_answers_sum_keeps_what_the_margin_is_made_of():
    labels = torch.full((1, 1500), 5)
    row = MicroBatch(labels, labels, labels, [0, 1500], (), {})
    values = -10 - torch.rand(1500, generator=torch.Generator().manual_seed(0))
    [found] = sum_by_segment(values, row).tolist()
    assert found == pytest.approx(math.fsum(values.tolist()), abs=1e-9)
