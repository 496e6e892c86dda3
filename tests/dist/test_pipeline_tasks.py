"""What tasks, callbacks and loaders of a user's own find where a model runs in stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from omnilit.callbacks.expert_load import ExpertLoad
from omnilit.errors import ConfigError, OmniError
from omnilit.modules import OmniDataModule, SFTModule
from omnilit.testing import run_ranks
from omnilit.types import LossTerm, MicroBatch, StepResult
from tests.helpers import training
from tests.helpers.tasks import check_step, write_task

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
PP: dict[str, Any] = {"pp_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, model={})
    return folder


class TwoForwards(SFTModule):
    """Runs the model twice a micro-batch; the second term is of another type."""

    @override
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        again = self.assembled.forward(batch).token_losses
        return {
            **super().loss_terms(batch),
            "squares": LossTerm(again.double().square().sum(), "tokens"),
        }


class HookLog(Callback):
    """Notes the hooks around backward, and whether there are gradients then."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self.seen.append(("before", True))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        has_gradients = all(p.grad is not None for p in pl_module.parameters())
        self.seen.append(("after", has_gradients))


def train_twice(
    folder: Path, name: str, accelerator: dict[str, Any]
) -> tuple[list[StepResult], list[tuple[str, bool]]]:
    hooks = HookLog()
    settings = {"accelerator": accelerator, "global_batch_size": 4, "max_steps": 2}
    log, _ = training.train(
        folder,
        training.arguments(folder / name, **settings),
        module_class=TwoForwards,
        data={"train_path": str(folder / "long.jsonl")},
        callbacks=(hooks,),
    )
    return log.results, hooks.seen


def test_a_task_of_two_forwards_trains_as_on_one_process(folder, tmp_path):
    ((alone, _),) = run_ranks(train_twice, 1, folder, "alone", {}, tmp_path=tmp_path)
    for steps, hooks in run_ranks(train_twice, 2, folder, "stages", PP, tmp_path=tmp_path):
        assert len(steps) == len(alone) == 2
        for found, expected in zip(steps, alone, strict=True):
            check_step(found, expected)
        assert hooks == [("before", True), ("after", True)] * 2  # once a step, whose batch is one


class FirstHalf(SFTModule):
    """Trains the layers of the first stage alone."""

    trained = ("embed_tokens", "layers.0.")

    @override
    def configure_model(self) -> None:
        is_new = self.policy is None
        super().configure_model()
        for name, parameter in self.assembled.model.named_parameters() if is_new else ():
            parameter.requires_grad_(any(part in name for part in self.trained))

    @override
    def parameter_part(self, name: str) -> str:
        return "head" if "lm_head" in name else super().parameter_part(name)


class SecondHalf(FirstHalf):
    """Trains the layers of the second stage alone."""

    trained = ("layers.1.", "norm.", "lm_head")


def train_halves(folder: Path, name: str, accelerator: dict[str, Any]) -> list[list[StepResult]]:
    found = []
    for task in (FirstHalf, SecondHalf):
        log, _ = training.train(
            folder,
            training.arguments(
                folder / f"{name} {task.__name__}",
                accelerator=accelerator,
                global_batch_size=4,
                max_steps=2,
                optimizer={"no_decay_params": ["embed_tokens"], "no_decay_modules": ["Linear"]},
            ),
            module_class=task,
            data={"train_path": str(folder / "long.jsonl")},
        )
        found.append(log.results)
    return found


def test_a_stage_may_have_nothing_to_train(folder, tmp_path):
    (alone,) = run_ranks(train_halves, 1, folder, "alone", {}, tmp_path=tmp_path)
    for halves in run_ranks(train_halves, 2, folder, "stages", PP, tmp_path=tmp_path):
        for steps, expected in zip(halves, alone, strict=True):
            for mine, theirs in zip(steps, expected, strict=True):
                check_step(mine, theirs)
                assert mine.lr == theirs.lr  # of all groups, on every rank


class OtherTokens(SFTModule):
    """Asks the model about tokens that the first stage has not seen."""

    @override
    def loss_terms(self, batch: MicroBatch) -> dict[str, LossTerm]:
        return super().loss_terms(replace(batch, input_ids=batch.input_ids.flip(1)))


def train_other_tokens(folder: Path) -> str:
    settings = {"accelerator": PP, "global_batch_size": 4, "max_steps": 2}
    try:
        training.train(
            folder,
            training.arguments(folder / "other", **settings),
            module_class=OtherTokens,
            data={"train_path": str(folder / "long.jsonl")},
        )
    except (OmniError, RuntimeError) as error:  # of the rank that waits: its peer has gone
        return str(error)
    return "nothing"


def test_other_tokens_than_those_of_the_micro_batch_are_refused(folder, tmp_path):
    _, last = run_ranks(train_other_tokens, 2, folder, tmp_path=tmp_path)
    assert "on the tokens of the micro-batch that loss_terms is given, and on no others" in last


def refusal(folder: Path, settings: dict[str, Any], *callbacks: Callback) -> str:
    given = {"accelerator": PP, "global_batch_size": 4, "max_steps": 1, **settings}
    arguments = training.arguments(folder / "refused", **given)
    data = {"train_path": str(folder / "long.jsonl")}
    try:
        training.train(folder, arguments, data=data, callbacks=callbacks)
    except ConfigError as error:
        return str(error)
    return "nothing"


def refusals(folder: Path) -> list[str]:
    found = [refusal(folder, {"global_batch_size": 1}), refusal(folder, {}, ExpertLoad(1))]
    with pytest.MonkeyPatch.context() as patch:  # as a data module of one's own would have it
        patch.setattr(OmniDataModule, "train_dataloader", lambda self: self.train_loader)
        return [*found, refusal(folder, {})]


def test_what_a_pipeline_cannot_do_is_refused_on_every_rank(folder, tmp_path):
    for said in run_ranks(refusals, 2, folder, tmp_path=tmp_path):
        micro_batches, load, loader = said
        assert micro_batches == (
            "train.global_batch_size: a step has 1 micro-batches, and 1f1b takes at least one for "
            "each of 2 stages. To fix: give a step more micro-batches."
        )
        assert load == (
            "train.log_expert_load_steps: the load of experts is not logged in a pipeline "
            "(pp_size). To fix: leave it out, or leave pp_size out."
        )
        assert loader == (
            "train.accelerator.pp_size: a pipeline trains on all micro-batches of a step at once, "
            "and the training loader gives one. To fix: let it give omnilit.types.StepWindow, or "
            "leave pp_size out."
        )
