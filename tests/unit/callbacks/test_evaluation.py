"""When `fit` evaluates, and that nothing else changes by it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from omnilit.callbacks.checkpointing import CheckpointSaver
from omnilit.callbacks.evaluation import EvaluationSchedule, RandomStates
from omnilit.config import CheckpointConfig

FOLLOWS = {"val_check_interval": 1, "check_val_every_n_epoch": None}  # what the CLI sets


def evaluated(module):
    return [int(event.split()[1]) for event in module.events if event.startswith("eval")]


@pytest.mark.parametrize("settings", [{}, FOLLOWS], ids=["defaults", "follows"])
@pytest.mark.parametrize(
    ("eval_steps", "eval_epochs", "expected"),
    [
        (0, 0, []),
        (2, 0, [2, 4, 6, 8, 10, 12]),
        (3, 0, [3, 6, 9, 12]),
        (0, 1, [4, 8, 12]),
        (0, 2, [8]),
        (3, 1, [3, 4, 6, 8, 9, 12]),  # step 12 is due twice and evaluated once
        (4, 1, [4, 8, 12]),
    ],
)
def test_steps_and_epochs_trigger_together_and_once(
    make_module, make_trainer, settings, eval_steps, eval_epochs, expected
):
    module = make_module()  # 8 micro-batches: 4 steps an epoch
    schedule = EvaluationSchedule(eval_steps=eval_steps, eval_epochs=eval_epochs)
    make_trainer(schedule, max_epochs=3, **settings).fit(module)
    assert evaluated(module) == expected


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_evaluation_data_without_a_batch_is_never_due(make_module, make_trainer):
    module = make_module(val_batches=0)
    make_trainer(EvaluationSchedule(eval_steps=1, eval_epochs=1)).fit(module)
    assert evaluated(module) == []


@pytest.mark.parametrize("saved_step", [2, 3], ids=["saved after evaluation", "saved without"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_resumed_run_goes_on_counting_optimizer_steps(
    make_module, make_trainer, tmp_path, saved_step, accumulation
):
    saver = CheckpointSaver(
        CheckpointConfig(output_dir=str(tmp_path), save_steps=saved_step, save_hf_weights=False)
    )
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    trainer = make_trainer(schedule, saver, max_steps=saved_step)
    trainer.fit(make_module(micro_batches=16))
    module = make_module(micro_batches=16)
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    trainer = make_trainer(schedule, max_steps=5, accumulate_grad_batches=accumulation)
    path = tmp_path / "checkpoints" / f"global_step_{saved_step}"
    trainer.fit(module, ckpt_path=path, weights_only=False)
    assert trainer.global_step == 5
    assert evaluated(module) == [4]  # not 2 again


def test_evaluation_leaves_every_random_state_as_it_was(make_module, make_trainer):
    draws = []
    for schedule in (
        EvaluationSchedule(eval_steps=1, eval_epochs=1),
        EvaluationSchedule(eval_steps=0, eval_epochs=0),
    ):
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        torch.manual_seed(7)
        module = make_module()
        make_trainer(schedule).fit(module)
        draws.append(module.draws)
    assert len(draws[0]) == 4
    assert draws[0] == draws[1]


def test_without_the_schedule_evaluation_does_change_random_states(make_module, make_trainer):
    draws = []
    for limit in (0, 1.0):
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        torch.manual_seed(7)
        module = make_module()
        make_trainer(val_check_interval=2, limit_val_batches=limit).fit(module)
        draws.append(module.draws)
    assert draws[0] != draws[1]


def draw():
    return random.random(), np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002


def test_random_states_come_back_after_draws():
    states = RandomStates.capture(torch.device("cpu"))
    first = draw()
    states.restore()
    assert draw() == first


def test_early_stopping_follows_each_evaluation(make_module, make_trainer):
    module = make_module()  # eval_loss grows with the step: the second evaluation is worse
    stopping = EarlyStopping("eval_loss", patience=1)
    schedule = EvaluationSchedule(eval_steps=1, eval_epochs=0)
    trainer = make_trainer(stopping, schedule, **FOLLOWS)
    trainer.fit(module)
    assert trainer.global_step == 2
    assert evaluated(module) == [1, 2]


def test_a_stop_brings_on_no_evaluation(make_module, make_trainer, stop_at):
    module = make_module()
    make_trainer(EvaluationSchedule(eval_steps=4, eval_epochs=1), stop_at(3)).fit(module)
    assert evaluated(module) == []


@pytest.mark.parametrize("error", [RuntimeError, None], ids=["after an error", "after fit"])
def test_lightnings_loops_get_their_own_methods_back(make_module, make_trainer, stop_at, error):
    trainer = make_trainer(EvaluationSchedule(eval_steps=1, eval_epochs=0), stop_at(2, error=error))
    if error is None:
        trainer.fit(make_module())
    else:
        with pytest.raises(error, match="as asked"):
            trainer.fit(make_module())
    epoch_loop = trainer.fit_loop.epoch_loop
    assert "_should_check_val_fx" not in vars(epoch_loop)
    assert "run" not in vars(epoch_loop.val_loop)


def test_a_failed_evaluation_leaves_random_states_as_they_were(make_module, make_trainer):
    class Fails(make_module):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise RuntimeError("in evaluation")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.state = torch.get_rng_state()

    module = Fails()
    with pytest.raises(RuntimeError, match="in evaluation"):
        make_trainer(EvaluationSchedule(eval_steps=1, eval_epochs=0)).fit(module)
    assert torch.equal(module.state, torch.get_rng_state())
