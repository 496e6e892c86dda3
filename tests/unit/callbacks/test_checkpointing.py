"""Which steps are saved, when, and with which position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from omnilit.callbacks.checkpointing import CheckpointSaver
from omnilit.callbacks.evaluation import EvaluationSchedule
from omnilit.checkpoint import layout
from omnilit.config import CheckpointConfig
from omnilit.errors import ConfigError


@pytest.fixture
def saver_for(tmp_path):
    def make(**settings):
        return CheckpointSaver(
            CheckpointConfig(
                **{"output_dir": str(tmp_path), "save_hf_weights": False, "save_epochs": 0}
                | settings
            )
        )

    return make


def saved_steps(folder):
    names = [path.name for path in folder.glob("checkpoints/*")]
    return sorted(int(name.removeprefix("global_step_")) for name in names)


def load(folder, step):
    return torch.load(folder / f"checkpoints/global_step_{step}", weights_only=False)


class Notes(Callback):
    """Writes each save into the module's events."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        events = pl_module.events
        assert isinstance(events, list)
        events.append(f"save {trainer.global_step}")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"save_steps": 3}, [3, 6, 9, 12]),
        ({"save_steps": 5}, [5, 10, 12]),  # the last step too
        ({"save_epochs": 1}, [4, 8, 12]),
        ({"save_epochs": 2}, [8, 12]),
        ({"save_steps": 4, "save_epochs": 1}, [4, 8, 12]),
    ],
)
def test_due_steps_and_the_last_one_are_saved_once(
    make_module, make_trainer, saver_for, tmp_path, settings, expected
):
    module = make_module()  # 4 steps an epoch
    make_trainer(saver_for(**settings), Notes(), max_epochs=3).fit(module)
    assert saved_steps(tmp_path) == expected
    assert module.events.count("save 12") == (12 in expected)


def test_a_step_is_evaluated_before_it_is_saved(make_module, make_trainer, saver_for):
    module = make_module()
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=1)
    make_trainer(saver_for(save_steps=1), schedule, Notes()).fit(module)
    assert module.events == ["save 1", "eval 2", "save 2", "save 3", "eval 4", "save 4"]


@pytest.mark.parametrize("eval_steps", [0, 1], ids=["after training", "after evaluation"])
@pytest.mark.parametrize(("step", "is_last"), [(2, False), (4, True)])
def test_the_position_is_that_of_the_step_with_its_epoch_open(
    make_module, make_trainer, saver_for, tmp_path, eval_steps, step, is_last
):
    schedule = EvaluationSchedule(eval_steps=eval_steps, eval_epochs=0)
    trainer = make_trainer(saver_for(save_steps=step), schedule, max_epochs=2)
    trainer.fit(make_module())
    saved = load(tmp_path, step)
    fit = saved["loops"]["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    assert (saved["global_step"], saved["epoch"]) == (step, 0)
    assert batches["current"]["ready"] == batches["current"]["processed"] == 2 * step
    assert batches["current"]["completed"] == 2 * step - (eval_steps == 0)
    assert batches["is_last_batch"] is is_last
    epochs = fit["epoch_progress"]["current"]
    assert epochs == {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def test_a_stop_in_the_middle_of_an_epoch_is_saved(
    make_module, make_trainer, saver_for, tmp_path, stop_at
):
    make_trainer(saver_for(save_epochs=1), stop_at(3)).fit(make_module())
    assert saved_steps(tmp_path) == [3]


def test_a_stop_asked_for_by_the_module_is_saved(make_module, make_trainer, saver_for, tmp_path):
    class Stops(make_module):
        def on_train_batch_end(self, outputs, batch, batch_idx):  # after the callbacks' own
            self.trainer.should_stop = self.trainer.global_step == 3

    make_trainer(saver_for(save_epochs=1), limit_val_batches=0).fit(Stops())
    assert saved_steps(tmp_path) == [3]
    assert load(tmp_path, 3)["epoch"] == 0


def test_a_stop_that_must_wait_saves_nothing_early(
    make_module, make_trainer, saver_for, tmp_path, stop_at
):
    trainer = make_trainer(saver_for(save_epochs=1), stop_at(1), max_epochs=2, min_epochs=2)
    trainer.fit(make_module())
    assert saved_steps(tmp_path) == [4, 8]


def test_after_an_exception_nothing_is_saved(
    make_module, make_trainer, saver_for, tmp_path, stop_at
):
    module = make_module()
    saver = saver_for(save_steps=2, save_hf_weights=True)
    with pytest.raises(RuntimeError, match="as asked"):
        make_trainer(saver, stop_at(4, error=RuntimeError)).fit(module)
    assert saved_steps(tmp_path) == [2]
    assert module.events == []


def test_the_last_weights_are_exported_into_the_last_step(
    make_module, make_trainer, saver_for, tmp_path
):
    module = make_module()
    make_trainer(saver_for(save_steps=2, save_hf_weights=True), Notes()).fit(module)
    export = f"export {tmp_path}/checkpoints/global_step_4/hf_ckpt"
    assert module.events == ["save 2", "eval 4", "save 4", export]


def test_the_last_weights_are_exported_without_a_save(
    make_module, make_trainer, saver_for, tmp_path
):
    module = make_module()
    trainer = make_trainer(saver_for(save_hf_weights=True), Notes(), max_epochs=2)
    trainer.fit(module)
    export = f"export {tmp_path}/checkpoints/global_step_8/hf_ckpt"
    assert module.events == ["eval 4", "eval 8", export]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hf_save_steps": 3}, [3, 6, 8]),  # and the end of the run
        ({"hf_save_steps": 4}, [4, 8]),  # the last one once
        ({"hf_save_epochs": 1}, [4, 8]),
        ({"hf_save_epochs": 2, "hf_save_steps": 3}, [3, 6, 8]),
        ({"hf_save_steps": 3, "save_hf_weights": False}, []),
    ],
)
def test_due_steps_are_exported_once_and_need_no_save(
    make_module, make_trainer, saver_for, tmp_path, settings, expected
):
    module = make_module()  # 4 steps an epoch
    saver = saver_for(**({"save_hf_weights": True} | settings))
    make_trainer(saver, max_epochs=2, limit_val_batches=0).fit(module)
    folder = tmp_path / "checkpoints"
    exports = [f"export {folder}/global_step_{step}/hf_ckpt" for step in expected]
    assert module.events == exports
    assert saved_steps(tmp_path) == []


def test_a_step_is_evaluated_then_saved_then_exported(
    make_module, make_trainer, saver_for, tmp_path
):
    module = make_module()
    saver = saver_for(save_steps=2, hf_save_steps=2, save_hf_weights=True)
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    make_trainer(saver, schedule, Notes()).fit(module)
    export = f"export {tmp_path}/checkpoints/global_step_{{}}/hf_ckpt"
    first, second = ["eval 2", "save 2", export.format(2)], ["eval 4", "save 4", export.format(4)]
    assert module.events == first + second


def test_what_was_loaded_is_not_exported_again(make_module, make_trainer, saver_for, tmp_path):
    settings = {"save_steps": 2, "hf_save_steps": 2, "save_hf_weights": True}
    make_trainer(saver_for(**settings), max_steps=2).fit(make_module())
    module = make_module()
    make_trainer(saver_for(**settings), limit_val_batches=0).fit(
        module, ckpt_path=tmp_path / "checkpoints/global_step_2", weights_only=False
    )
    assert module.events == [f"export {tmp_path}/checkpoints/global_step_4/hf_ckpt"]


def test_a_second_fit_exports_its_own_weights(make_module, make_trainer, saver_for):
    saver = saver_for(save_hf_weights=True)
    for _ in range(2):
        module = make_module()
        make_trainer(saver, limit_val_batches=0).fit(module)
        assert len(module.events) == 1


def test_a_trial_run_leaves_nothing(make_module, make_trainer, saver_for, tmp_path):
    module = make_module()
    saver = saver_for(save_steps=1, save_hf_weights=True)
    make_trainer(saver, fast_dev_run=2, accumulate_grad_batches=1).fit(module)
    assert saved_steps(tmp_path) == []
    assert module.events == ["eval 2"]


def test_validate_after_a_failed_fit_saves_nothing(
    make_module, make_trainer, saver_for, tmp_path, stop_at
):
    module = make_module()
    trainer = make_trainer(saver_for(save_steps=1), stop_at(3, error=RuntimeError))
    with pytest.raises(RuntimeError, match="as asked"):
        trainer.fit(module)
    trainer.validate(module, verbose=False)
    assert saved_steps(tmp_path) == [1, 2]


def test_what_was_loaded_is_not_saved_again(
    make_module, make_trainer, saver_for, tmp_path, stop_at
):
    make_trainer(saver_for(save_steps=2), max_steps=2).fit(make_module())
    module = make_module()
    # stops in the first micro-batch after the load, before a step is done
    make_trainer(saver_for(save_steps=2), stop_at(2), Notes()).fit(
        module, ckpt_path=tmp_path / "checkpoints/global_step_2", weights_only=False
    )
    assert module.events.count("save 2") == 0


def test_a_save_after_evaluation_sees_the_random_states_of_the_next_step(
    make_module, make_trainer, saver_for
):
    states = []

    class Probe(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            states.append(torch.get_rng_state())

        def on_train_batch_start(self, trainer, *args, **kwargs):
            if trainer.global_step == 2:
                states.append(torch.get_rng_state())

    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    make_trainer(saver_for(save_steps=2), schedule, Probe()).fit(make_module())
    assert torch.equal(states[0], states[1])


def test_a_complete_run_that_lost_its_export_writes_it_when_it_is_resumed(tmp_path):
    saver = CheckpointSaver(CheckpointConfig(output_dir=str(tmp_path), save_epochs=0))
    exported = []

    finished: Any = SimpleNamespace(fast_dev_run=False, global_step=8)

    module: Any = SimpleNamespace(export_weights=exported.append)
    saver.on_fit_end(finished, module)
    assert exported == [tmp_path / "checkpoints" / "global_step_8" / "hf_ckpt"]
    saver.on_fit_end(finished, module)
    assert len(exported) == 1


@pytest.mark.parametrize(
    ("settings", "num_bytes"),
    [
        # weights 1100 * 4 bytes, moments of the trainable 1000 twice that
        ({"save_steps": 2}, 4400 + 8000),
        ({"save_epochs": 1, "save_hf_weights": True}, 4400 + 8000),
        ({"save_hf_weights": True}, 4400),
        ({"save_hf_weights": True, "hf_save_steps": 1, "half": True}, 2200),
    ],
)
def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(
    make_module, make_trainer, saver_for, monkeypatch, settings, num_bytes
):
    module = make_module()
    module.net.weight = torch.nn.Parameter(torch.zeros(1000))
    module.net.frozen = torch.nn.Parameter(torch.zeros(100), requires_grad=False)
    module.net.tied = module.net.weight
    if settings.get("half"):  # an export is as large as its own type makes it
        module.export_dtype = torch.bfloat16
    settings = {name: value for name, value in settings.items() if name != "half"}
    free = [num_bytes - 1]
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with pytest.raises(ConfigError, match=r"GiB free, one checkpoint takes .* make room"):
        make_trainer(saver_for(**settings)).fit(module)
    assert module.step_result is None
    free[0] = num_bytes
    saver_for(**settings).on_fit_start(make_trainer(), module)


@pytest.mark.parametrize("changes", [{}, {"fast_dev_run": 1, "accumulate_grad_batches": 1}])
def test_a_run_that_saves_nothing_needs_no_room(
    make_module, make_trainer, saver_for, monkeypatch, changes
):
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    module = make_module()
    make_trainer(saver_for(save_steps=len(changes)), **changes).fit(module)
    assert module.step_result is not None
