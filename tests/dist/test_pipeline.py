"""The stages of a pipeline in the order of each schedule, against one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnilit.errors import OmniError
from omnilit.parallel.collectives import share_from
from omnilit.parallel.pipeline import Pipeline, Wire
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist
NUM_STAGES, NUM_BATCHES, TOKENS, WIDTH = 4, 6, 5, 3
CPU = torch.device("cpu")
WIRE = Wire(((1, TOKENS, WIDTH), (2,)), (torch.float32, torch.float32))
SCHEDULES = {
    "1f1b": ("1f1b", 4, 1),
    "gpipe": ("gpipe", 4, 1),
    "interleaved": ("interleaved", 2, 2),
}


def layer(number: int) -> nn.Linear:
    torch.manual_seed(number)
    return nn.Linear(WIDTH, WIDTH)


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 9, (NUM_BATCHES, TOKENS), generator=generator)


def embed(ids: Tensor) -> Tensor:
    return torch.stack([ids * 0.1, ids * 0.2, -ids * 0.1], dim=-1)


@dataclass
class Toy:
    """A layer that hands on its hidden states, and with them sums over the stages so far.

    Args:
        number: Of the stage.
        fails_at: Micro-batch that it raises at.
        widens: Hands on more than the next stage expects.
    """

    number: int
    fails_at: int = -1
    widens: bool = False
    seen: list[int] = field(default_factory=list)
    backwards: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layer = layer(self.number)

    def run(self, inputs: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
        if number == self.fails_at:
            raise OmniError("the stage has no more")
        self.seen.append(number)
        hidden, sums = (embed(inputs[0]), None) if self.number == 0 else inputs
        hidden = torch.tanh(self.layer(hidden))
        own = torch.stack([hidden.mean(), hidden.square().mean()])
        sums = own if sums is None else sums + own
        if self.number == NUM_STAGES - 1:
            return ((hidden.sum() * (number + 1) + sums[0] * sums[1])[None],)
        return (hidden.repeat(1, 2, 1) if self.widens else hidden, sums)

    def before_backward(self, *, is_last: bool) -> None:
        self.backwards.append(is_last)


def reference() -> tuple[float, dict[int, Tensor]]:
    toys = [Toy(number) for number in range(NUM_STAGES)]
    total = torch.zeros(())
    for number, ids in enumerate(tokens()):
        states: tuple[Tensor, ...] = (ids[None],)
        for toy in toys:
            states = toy.run(states, number)
        total = total + states[0].sum()
    total.backward()
    found = {toy.number: grad for toy in toys if (grad := toy.layer.weight.grad) is not None}
    return float(total.detach()), found


def pipeline_of(schedule: str, per_rank: int, **settings: Any) -> Pipeline:
    group = dist.group.WORLD
    assert group is not None
    own = range(dist.get_rank(), NUM_STAGES, NUM_STAGES // per_rank)
    return Pipeline(
        {number: Toy(number, **settings) for number in own},
        num_stages=NUM_STAGES,
        group=group,
        schedule=schedule,
        device=CPU,
    )


def train(schedule: str, per_rank: int) -> dict[str, Any]:
    pipeline = pipeline_of(schedule, per_rank)
    losses = [float(pipeline.train(tokens(), WIRE)) for _ in range(2)]
    toys = [toy for toy in pipeline.stages.values() if isinstance(toy, Toy)]
    return {
        "losses": losses,
        "grads": {toy.number: toy.layer.weight.grad for toy in toys},
        "seen": [toy.seen for toy in toys],
        "backwards": [toy.backwards for toy in toys],
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_adds_up_what_one_process_does(schedule: str, tmp_path: Path):
    name, size, per_rank = SCHEDULES[schedule]
    loss, grads = reference()
    ranks = run_ranks(train, size, name, per_rank, tmp_path=tmp_path)
    held = [number for rank in ranks for number in rank["grads"]]
    assert sorted(held) == list(range(NUM_STAGES))
    for rank in ranks:
        assert rank["losses"] == pytest.approx([loss, loss], rel=1e-6)
        for number, grad in rank["grads"].items():  # of two steps, added up
            assert torch.allclose(grad, 2 * grads[number], rtol=1e-5, atol=1e-6)
        for seen, backwards in zip(rank["seen"], rank["backwards"], strict=True):
            assert seen == [*range(NUM_BATCHES)] * 2
            assert backwards == [*[False] * (NUM_BATCHES - 1), True] * 2


def other_shapes() -> list[float]:
    """Another number of micro-batches, then another length of rows, then the first again."""
    pipeline = pipeline_of("1f1b", 1)
    longer = Wire(((1, 2 * TOKENS, WIDTH), (2,)), WIRE.dtypes)
    runs = [(tokens(), WIRE), (tokens()[:4], WIRE), (tokens().repeat(1, 2), longer)]
    return [float(pipeline.train(rows, wire)) for rows, wire in (*runs, runs[0])]


def test_a_step_may_have_another_shape_than_the_one_before(tmp_path: Path):
    first, *others = zip(*run_ranks(other_shapes, 4, tmp_path=tmp_path), strict=True)
    assert len(set(first)) == 1
    assert set(others[-1]) == set(first)
    assert not set(others[0]) & set(first)


def evaluate(schedule: str, per_rank: int) -> list[list[int]]:
    pipeline = pipeline_of(schedule, per_rank)
    with torch.no_grad():
        for number, ids in enumerate(tokens()):
            pipeline.evaluate(ids[None], number, WIRE)
    return [toy.seen for toy in pipeline.stages.values() if isinstance(toy, Toy)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluation_sends_each_micro_batch_through_every_stage(schedule: str, tmp_path: Path):
    name, size, per_rank = SCHEDULES[schedule]
    for rank in run_ranks(evaluate, size, name, per_rank, tmp_path=tmp_path):
        assert rank == [[*range(NUM_BATCHES)]] * per_rank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fails_at": 0}, "the stage has no more"),
        ({"widens": True}, "a pipeline stage gave .*1, 10, 3.* and the next one expects .*1, 5, 3"),
    ],
)
def test_the_first_stage_raises_its_own_error(settings, message, tmp_path: Path):
    with pytest.raises(AssertionError) as caught:  # the others wait until their time is over
        run_ranks(fail_on_first, 4, settings, message, tmp_path=tmp_path, timeout_s=10)
    assert "raised as it should" in str(caught.value)


def fail_on_first(settings: dict[str, Any], message: str) -> None:
    if dist.get_rank() == 0:
        with pytest.raises(OmniError, match=message):
            pipeline_of("gpipe", 1, **settings).train(tokens(), WIRE)
        raise AssertionError("raised as it should")
    pipeline_of("gpipe", 1).train(tokens(), WIRE)


def share() -> Any:
    group = dist.group.WORLD
    assert group is not None
    return share_from(1, {"rank": dist.get_rank(), "losses": [1.5]}, group)


def test_a_value_of_one_rank_reaches_all(tmp_path: Path):
    assert run_ranks(share, 3, tmp_path=tmp_path) == [{"rank": 1, "losses": [1.5]}] * 3
