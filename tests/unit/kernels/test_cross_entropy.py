from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from omnilit.kernels import cross_entropy as module
from omnilit.kernels.cross_entropy import chunk_loss, chunked, eager
from omnilit.types import IGNORE


def problem(rows, *, has_bias=False, dtype=torch.float32, vocab=37):
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 16, generator=make).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 16, generator=make).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=make).to(dtype).requires_grad_() if has_bias else None
    targets = torch.randint(0, vocab, (rows,), generator=make)
    targets[::5] = IGNORE
    return hidden, weight, targets, bias


def run(kernel, inputs, weights, softcap):
    hidden, weight, targets, bias = inputs
    losses = kernel(hidden, weight, targets, bias, softcap)
    wanted = [x for x in (hidden, weight, bias) if x is not None]
    return losses, torch.autograd.grad((losses * weights).sum(), wanted)


def full(hidden, weight, targets, bias, softcap):
    return eager(hidden, weight, targets, bias_V=bias, softcap=softcap)


def in_chunks_of(num_rows):
    def kernel(hidden, weight, targets, bias, softcap):
        return chunked(hidden, weight, targets, bias, softcap, num_rows)

    return kernel


def kernel_of_the_slot(hidden, weight, targets, bias, softcap):
    return chunk_loss(hidden, weight, targets, bias_V=bias, softcap=softcap)


def test_eager_is_the_cross_entropy_of_the_logits():
    hidden, weight, targets, _ = problem(9)
    expected = cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(eager(hidden, weight, targets), expected)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    losses = chunked(
        torch.zeros(3, 4), torch.ones(8, 4), torch.tensor([0, 7, IGNORE]), None, None, 2
    )
    torch.testing.assert_close(losses, torch.tensor([8.0, 8.0, 1.0]).log())


def test_a_cap_bounds_the_logits():
    hidden, weight = torch.tensor([[100.0]]), torch.tensor([[1.0], [-1.0]])
    loss = eager(hidden, weight, torch.tensor([1]), softcap=2.0)
    torch.testing.assert_close(loss, torch.tensor([4.0]).exp().log1p())


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "num_rows"), [(1, 4), (4, 4), (5, 4), (11, 3), (0, 4), (6, 100)])
def test_chunks_change_nothing_for_any_weighting_of_the_rows(rows, num_rows, has_bias, softcap):
    inputs = problem(rows, has_bias=has_bias)
    weights = torch.linspace(-1, 2, rows)
    expected, expected_grads = run(full, inputs, weights, softcap)
    found, grads = run(in_chunks_of(num_rows), inputs, weights, softcap)
    torch.testing.assert_close(found, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_rows_that_are_all_ignored_cost_nothing():
    hidden, weight, targets, _ = problem(6)
    inputs = (hidden, weight, torch.full_like(targets, IGNORE), None)
    losses, grads = run(in_chunks_of(4), inputs, torch.ones(6), None)
    assert not losses.any()
    assert not any(grad.any() for grad in grads)


def test_a_micro_batch_without_a_target_has_no_losses_and_gradients_of_zero():
    inputs = problem(0)
    losses, grads = run(kernel_of_the_slot, inputs, torch.ones(0), None)
    assert losses.shape == (0,)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs[:2]]
    assert not any(grad.any() for grad in grads)


def test_bfloat16_sums_the_weight_gradient_in_float32():
    inputs = problem(64, dtype=torch.bfloat16)
    exact = tuple(x if i == 2 or x is None else x.detach().float().requires_grad_()
                  for i, x in enumerate(inputs))  # fmt: skip
    expected, expected_grads = run(full, exact, torch.ones(64), None)
    losses, grads = run(in_chunks_of(2), inputs, torch.ones(64), None)
    assert losses.dtype == torch.float32
    # Logits are rounded to 8 bits: 2 ** -8 of their size, here at most 20.
    torch.testing.assert_close(losses, expected, rtol=0, atol=20 / 256)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        error = (grad.float() - wanted).norm() / wanted.norm()
        assert error < 2 / 256  # a rounding of the softmax and one of the result, no more


def test_one_threshold_decides_between_all_logits_and_chunks(monkeypatch):
    hidden, weight, targets, _ = problem(10, vocab=8)
    seen = []

    def watch(*args):
        seen.append(args[-2])
        return chunked(*args)

    monkeypatch.setattr(module, "chunked", watch)
    monkeypatch.setattr(module, "MAX_LOGITS", 80)
    at_the_threshold = chunk_loss(hidden, weight, targets)
    monkeypatch.setattr(module, "MAX_LOGITS", 79)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 31)
    torch.testing.assert_close(chunk_loss(hidden, weight, targets), at_the_threshold)
    assert seen == [10, 3]  # all rows, and the most whose logits fit into a chunk


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("num_rows", [4, 10])
def test_blocks_of_rows_that_fit_a_cache_change_nothing(num_rows, softcap, monkeypatch):
    monkeypatch.setattr(module, "CACHED_LOGITS", 2 * 37)
    inputs, weights = problem(10, has_bias=True), torch.linspace(-1, 2, 10)
    expected, expected_grads = run(full, inputs, weights, softcap)
    found, grads = run(in_chunks_of(num_rows), inputs, weights, softcap)
    torch.testing.assert_close(found, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_kept_logits_serve_a_second_backward():
    hidden, weight, targets, _ = problem(6)
    losses = chunk_loss(hidden, weight, targets)
    first, second = (
        torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_added_up_in_blocks_of_the_vocabulary(dtype, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    hidden, weight, targets, _ = problem(10, vocab=8)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    losses = eager(hidden, weight, targets), chunked(hidden, weight, targets, None, None, 4)
    found = [torch.autograd.grad(loss.sum(), (hidden, weight)) for loss in losses]
    # bfloat16 rounds the logits and their gradients
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    for ours, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=bound, atol=bound)


def test_no_gradient_is_computed_when_none_is_wanted():
    hidden, weight, targets, _ = problem(5)
    with torch.no_grad():
        assert not chunked(hidden, weight, targets, None, None, 2).requires_grad


@pytest.mark.parametrize("num_rows", [3, 100])
def test_a_frozen_head_costs_no_gradient_of_its_own(monkeypatch, num_rows):
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 16, generator=make).requires_grad_()
    weight, targets = torch.randn(30, 16, generator=make), torch.arange(12)
    # operations in place are not counted
    monkeypatch.setattr(module, "_add_product", lambda sums, grad, rows: sums.add_(grad.t() @ rows))
    flops, gradients = {}, {}
    for is_trained in (True, False):
        own, hidden.grad = weight.clone().requires_grad_(is_trained), None
        losses = chunked(hidden, own, targets, None, None, num_rows)
        with FlopCounterMode(display=False) as counter:
            losses.sum().backward()
        flops[is_trained], gradients[is_trained] = counter.get_total_flops(), hidden.grad
        assert (own.grad is not None) == is_trained
    assert flops[True] - flops[False] == 2 * 12 * 30 * 16
    assert torch.equal(gradients[True], gradients[False])
