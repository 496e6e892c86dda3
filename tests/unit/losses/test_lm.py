from __future__ import annotations

import torch

from omnilit.losses.lm import lm_terms


def test_the_token_term_is_their_sum():
    terms = lm_terms(torch.tensor([1.0, 2.0, 4.0]))
    assert terms.keys() == {"lm"}
    assert (terms["lm"].sum.item(), terms["lm"].count) == (7.0, "tokens")


def test_the_balance_loss_enters_with_the_share_of_its_micro_batch():
    first = lm_terms(torch.ones(3), aux_loss=torch.tensor(2.0), aux_coefficient=0.1)
    second = lm_terms(torch.ones(1), aux_loss=torch.tensor(6.0), aux_coefficient=0.1)
    step = (first["balance"].sum + second["balance"].sum) / 4
    torch.testing.assert_close(step, torch.tensor(0.1 * (2.0 * 3 / 4 + 6.0 * 1 / 4)))
    assert first["balance"].count == "tokens"


def test_a_micro_batch_without_labels_weighs_nothing_and_keeps_its_graph():
    losses = torch.zeros(0, requires_grad=True)
    aux = torch.tensor(2.0, requires_grad=True)
    terms = lm_terms(losses, aux_loss=aux, aux_coefficient=0.1)
    total = terms["lm"].sum + terms["balance"].sum
    total.backward()
    assert total.item() == 0
    assert aux.grad is not None
    assert aux.grad.item() == 0
