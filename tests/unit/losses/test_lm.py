from __future__ import annotations

import pytest
import torch

from omnilit.losses.lm import lm_terms


def test_the_token_term_is_their_sum():
    terms = lm_terms(torch.tensor([1.0, 2.0, 4.0]))
    assert terms.keys() == {"lm"}
    assert (terms["lm"].sum.item(), terms["lm"].count) == (7.0, "tokens")


def test_the_balance_loss_is_a_mean_over_the_tokens():
    term = lm_terms(torch.ones(3), balance=torch.tensor(0.1 * 3 * 2.0))["balance"]
    assert (term.sum.item(), term.count) == (pytest.approx(0.6), "tokens")


def test_a_micro_batch_without_labels_weighs_nothing_and_keeps_its_graph():
    losses = torch.zeros(0, requires_grad=True)
    aux = torch.tensor(2.0, requires_grad=True)
    terms = lm_terms(losses, balance=0 * aux)
    total = terms["lm"].sum + terms["balance"].sum
    total.backward()
    assert total.item() == 0
    assert aux.grad is not None
    assert aux.grad.item() == 0
