import pytest
import torch
from torch import nn

from omnilit.kernels import products
from omnilit.kernels.overrides import replace_operators
from omnilit.kernels.products import FLOAT32_PRODUCTS


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def counted():
    """The operators in place, and the names of those that ran."""
    calls: list[str] = []

    def note(name):
        def run(*args, **kwargs):
            calls.append(name)
            return FLOAT32_PRODUCTS[name](*args, **kwargs)

        return run

    undo = replace_operators({name: note(name) for name in FLOAT32_PRODUCTS}, "CPU")
    yield calls
    undo()


@pytest.mark.parametrize("block", [4096, 7])
@pytest.mark.parametrize("shape", [(5, 16, 9), (16, 15, 14), (1, 1, 1), (0, 3, 4), (3, 0, 4)])
def test_a_product_is_the_float32_product_rounded_once(monkeypatch, block, shape):
    monkeypatch.setattr(products, "BLOCK", block)
    rows, inner, columns = shape
    a, b, bias = draw(rows, inner), draw(inner, columns, seed=1), draw(columns, seed=2)
    exact = a.double() @ b.double()
    torch.testing.assert_close(products.mm(a, b), exact.bfloat16(), rtol=2**-7, atol=1e-6)
    with_bias = products.addmm(bias, a, b, beta=0.5, alpha=2.0)
    expected = (bias.double() * 0.5 + exact * 2).bfloat16()
    torch.testing.assert_close(with_bias, expected, rtol=2**-7, atol=1e-6)
    batch_a, batch_b = draw(3, rows, inner), draw(3, inner, columns, seed=1)
    expected = (batch_a.double() @ batch_b.double()).bfloat16()
    torch.testing.assert_close(products.bmm(batch_a, batch_b), expected, rtol=2**-7, atol=1e-6)


def test_a_bias_of_weight_zero_is_left_out_even_where_it_is_nan():
    a, b = draw(3, 4), draw(4, 5)
    bias = torch.full((5,), float("nan"), dtype=torch.bfloat16)
    assert torch.equal(products.addmm(bias, a, b, beta=0), products.mm(a, b))


def test_they_stand_under_autograd_and_give_torchs_gradients(counted):
    layer, x = nn.Linear(12, 7, dtype=torch.bfloat16), draw(2, 5, 12).requires_grad_()
    scores = x @ x.transpose(1, 2)
    (layer(x).sum() + scores.sum()).backward()
    assert {"addmm", "mm", "bmm"} == set(counted)
    wide = nn.Linear(12, 7)
    wide.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    y = x.detach().float().requires_grad_()
    (wide(y).sum() + (y @ y.transpose(1, 2)).sum()).backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(layer.weight.grad.float(), wide.weight.grad, rtol=2**-7, atol=0.02)
    torch.testing.assert_close(x.grad.float(), y.grad, rtol=2**-7, atol=0.05)


def test_other_dtypes_are_torchs_own_products_and_mixtures_stay_refused(counted):
    a, b = torch.randn(4, 6), torch.randn(6, 3)
    with_ours = a @ b, torch.addmm(b[0], a, b), torch.bmm(a[None], b[None])
    assert counted == ["mm", "addmm", "bmm"]
    out = torch.empty(4, 3)
    assert torch.equal(with_ours[0], torch.mm(a, b, out=out))
    assert torch.equal(with_ours[1], torch.addmm(b[0], a, b, out=out))
    assert torch.equal(with_ours[2], torch.bmm(a[None], b[None], out=out[None]))
    assert torch.equal(
        torch.eye(2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.int64),
    )
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(a.bfloat16(), b)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        torch.mm(draw(2, 3), draw(4, 2))


def test_sizes_that_do_not_fit_are_refused_where_blocks_would(monkeypatch):
    monkeypatch.setattr("omnilit.kernels.products.BLOCK", 4)
    a, b, bias = (torch.zeros(*shape).bfloat16() for shape in ((2, 4), (5, 3), (3,)))
    undo = replace_operators(FLOAT32_PRODUCTS, "CPU")
    try:
        for run in (lambda: a @ b, lambda: torch.addmm(bias, a, b)):
            with pytest.raises(RuntimeError, match=r"cannot be multiplied \(2x4 and 5x3\)"):
                run()
    finally:
        undo()


def test_torchs_own_operators_come_back_and_undoing_twice_is_harmless():
    calls: list[int] = []

    def mm(a, b):
        calls.append(1)
        return products.mm(a, b)

    undo = replace_operators({"mm": mm}, "CPU")
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    undo()
    undo()
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert calls == [1]
