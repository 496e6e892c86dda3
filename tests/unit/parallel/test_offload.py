"""What leaves the device between forward and backward, and in which order it comes back."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from omnilit.errors import TrainingError
from omnilit.parallel import offload
from omnilit.parallel.copies import Copies
from omnilit.parallel.offload import ActivationOffload, Budget
from tests.helpers.models import gradients, worst_difference

CPU = torch.device("cpu")
ROWS, WIDTH, DEPTH = 16, 32, 4
BLOCK = ROWS * WIDTH * 4  # bytes of an activation, in float32


class Layer(nn.Module):
    """Saves its input, and its output by the tanh; the next layer saves that one again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).tanh()


class Stack(nn.Module):
    """Some layers, run plainly or each recomputed."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.form = form

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            if self.form == "plain":
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.form == "reentrant")
        return hidden


class Diary(Copies):
    """Notes when what goes and comes, by the first value of each block."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.notes: list[tuple[str, float]] = []

    def send(self, values: Tensor) -> Tensor:
        self.notes.append(("send", float(values.view(torch.float32)[0])))
        return super().send(values)

    def bring(self, host: Tensor) -> Tensor:
        self.notes.append(("bring", float(host.view(torch.float32)[0])))
        return super().bring(host)


def inputs(*, learns: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator).requires_grad_(learns)


def offloaded(model: Stack, limit: int, copies: Copies | None = None) -> ActivationOffload:
    moving = ActivationOffload(copies or Copies(CPU), limit=limit)
    moving.watch([model, *model.layers])
    return moving


@pytest.mark.parametrize(
    ("limit", "sizes", "leaving"),
    [
        (0, [5, 3], [[1], [2]]),
        (10, [5, 5, 5, 5], [[], [], [1], [2]]),
        (10, [4, 4, 9], [[], [], [1, 2]]),
        (10, [4, 11, 3], [[], [1, 2], []]),
        (10, [10, 1], [[], [1]]),
    ],
)
def test_the_newest_blocks_stay_up_to_the_limit(limit, sizes, leaving):
    budget = Budget(limit)
    assert [budget.add(number, size) for number, size in enumerate(sizes, 1)] == leaving
    gone = {number for numbers in leaving for number in numbers}
    assert budget.kept == sum(size for n, size in enumerate(sizes, 1) if n not in gone)


def test_a_block_that_is_gone_makes_room_once():
    budget = Budget(10)
    budget.add(1, 6)
    budget.remove(1)
    budget.remove(1)
    assert budget.add(2, 10) == []
    assert budget.kept == 10


@pytest.mark.parametrize("form", ["plain", "recomputed", "reentrant"])
@pytest.mark.parametrize("kept", [0, 1, 3, 99])
def test_gradients_are_equal_and_the_bytes_are_those_of_the_rule(form, kept):
    model, plain = Stack(form), Stack("plain")
    learns = form == "reentrant"  # which needs an input with a gradient
    moving = offloaded(model, kept * BLOCK + BLOCK // 2)
    for _ in range(2):
        with moving.saving():
            total = model(inputs(learns=learns)).sum()
        total.backward()
        plain(inputs()).sum().backward()
    assert worst_difference(gradients(model), gradients(plain)) == 0
    # the input of each layer, and the last one's output; a recomputed layer keeps its input only
    blocks = DEPTH + (form == "plain")
    assert moving.saved_bytes == 2 * blocks * BLOCK
    assert moving.moved_bytes == 2 * max(blocks - kept, 0) * BLOCK


def test_the_unit_before_is_on_its_way_when_a_unit_begins_its_backward():
    model, diary = Stack("recomputed"), Diary()
    moving = offloaded(model, 0, diary)
    for layer in model.layers:
        layer.register_forward_pre_hook(
            lambda _, given: diary.notes.append(("run", float(given[0][0, 0].detach())))
        )
    with moving.saving():
        total = model(inputs()).sum()
    firsts = [value for what, value in diary.notes if what == "run"]
    del diary.notes[:]
    total.backward()
    one, two, three, four = firsts
    assert diary.notes == [
        ("bring", four), ("bring", three), ("run", four),
        ("bring", two), ("run", three),
        ("bring", one), ("run", two),
        ("run", one),
    ]  # fmt: skip


def test_views_of_one_memory_travel_once_and_keep_their_layout():
    moving = ActivationOffload(Copies(CPU), limit=0)
    hidden = torch.randn(64, 96, requires_grad=True)
    fused = hidden * 1.0
    seen = []
    with moving.saving():
        packed = [moving._pack(part) for part in (*fused.detach().chunk(3, 1), fused.detach().t())]
    for part, saved in zip((*fused.chunk(3, 1), fused.t()), packed, strict=True):
        back = moving._unpack(saved)
        seen.append((back.stride() == part.stride(), torch.equal(back, part)))
    assert seen == [(True, True)] * 4
    assert moving.moved_bytes == fused.nbytes


def test_parameters_views_of_them_and_small_tensors_stay():
    model = Stack()
    moving = offloaded(model, 0)
    weight = next(model.layers.parameters())
    model(inputs())
    small = torch.ones(8)
    for tensor in (weight, weight.detach().t(), weight.detach()[3:], small):
        assert moving._pack(tensor) is tensor
    assert moving.saved_bytes == 0


def test_what_is_on_another_device_stays_there():
    moving, tensor = ActivationOffload(Copies(torch.device("meta")), limit=0), torch.ones(64, 64)
    assert moving._pack(tensor) is tensor


def test_memory_that_stands_where_another_stood_is_another_block(monkeypatch):
    monkeypatch.setattr(offload, "_address", lambda storage: 7)
    moving, kept = ActivationOffload(Copies(CPU), limit=0), []
    for value in range(3):
        tensor = torch.full((64, 64), float(value))
        kept.append(moving._pack(tensor))
        del tensor
    assert [float(moving._unpack(saved)[0, 0]) for saved in kept] == [0, 1, 2]


def test_what_was_moved_is_free_on_the_device_at_once():
    x, references = torch.ones(64, 64, requires_grad=True), []
    gc.disable()
    try:
        with ActivationOffload(Copies(CPU), limit=0).saving():
            hidden = x * 2
            for _ in range(4):
                hidden = hidden.tanh()
                references.append(StorageWeakRef(hidden.untyped_storage()))
            total = hidden.sum()
        del hidden
        assert all(reference.expired() for reference in references)
        total.backward()
    finally:
        gc.enable()


def test_a_forward_that_nobody_follows_backward_leaves_nothing_behind():
    model = Stack()
    moving = offloaded(model, 2 * BLOCK)
    for _ in range(3):
        with moving.saving():
            model(inputs())
    assert moving._budget.kept == 0
    with moving.saving():
        assert not moving._known
        assert not moving._by_unit


@pytest.mark.parametrize("limit", [0, 10 * BLOCK])
def test_an_activation_written_to_after_it_was_saved_is_an_error(limit):
    moving = ActivationOffload(Copies(CPU), limit=limit)
    x = torch.randn(64, 64, requires_grad=True)
    with moving.saving():
        hidden = x * 2
        squared = hidden * hidden
        if limit:
            with torch.no_grad():
                hidden += 1
            with pytest.raises(TrainingError, match="changed in place after it was saved"):
                squared.sum().backward()
        else:  # it was copied before, so the values are those that were saved
            with torch.no_grad():
                hidden += 1
            squared.sum().backward()
            assert x.grad is not None
            torch.testing.assert_close(x.grad, 8 * x.detach())
