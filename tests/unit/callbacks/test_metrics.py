"""`metrics.jsonl`: one line a step, with the step's evaluation, whatever happens."""

from __future__ import annotations

import json
import math
import time

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger

from omnilit.callbacks.checkpointing import CheckpointSaver
from omnilit.callbacks.evaluation import EvaluationSchedule
from omnilit.callbacks.metrics import MetricsRecorder
from omnilit.callbacks.metrics_file import MetricsFile
from omnilit.config import CheckpointConfig
from omnilit.kernels.machine import Machine


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step_holds_the_steps_numbers(make_module, make_trainer, tmp_path):
    make_trainer(MetricsRecorder(tmp_path), max_epochs=2).fit(make_module())
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4
    first = lines[0]
    assert first["tokens_per_second"] == pytest.approx(12 / first["step_time_s"])
    assert 0.01 < first["max_memory_gib"] < 1024
    measured = {"step_time_s", "tokens_per_second", "max_memory_gib"}
    assert {k: v for k, v in first.items() if k not in measured} == {
        "step": 1,
        "epoch": 0,
        "loss": 1.0,
        "grad_norm": 0.5,
        "lr": 0.1,
        "lr/backbone": 0.1,
        "lr/backbone/no_decay": 0.2,
        "tokens": 10,
        "data_wait_s": 0.25,
        "skipped_steps": 0,
    }


def test_several_loss_terms_stand_apart(make_module, make_trainer, tmp_path):
    module = make_module()
    module.losses = {"lm": 1.0, "balance": 0.25}
    make_trainer(MetricsRecorder(tmp_path)).fit(module)
    line = read(tmp_path / "metrics.jsonl")[0]
    assert (line["loss"], line["loss/lm"], line["loss/balance"]) == (1.25, 1.0, 0.25)


def test_numbers_that_are_not_finite_become_null(make_module, make_trainer, tmp_path):
    module = make_module()
    module.grad_norm, module.losses = math.inf, {"tokens": math.nan}
    make_trainer(MetricsRecorder(tmp_path)).fit(module)
    line = read(tmp_path / "metrics.jsonl")[0]
    assert line["grad_norm"] is None
    assert line["loss"] is None


def test_an_evaluations_numbers_join_their_step(make_module, make_trainer, tmp_path):
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    make_trainer(MetricsRecorder(tmp_path), schedule).fit(make_module())
    lines = read(tmp_path / "metrics.jsonl")
    assert [line.get("eval_loss") for line in lines] == [None, 4.0, None, 6.0]


@pytest.mark.parametrize("eval_steps", [0, 1])
def test_the_line_is_on_disk_before_its_step_is_saved(
    make_module, make_trainer, tmp_path, eval_steps
):
    seen = []

    class Probe(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            lines = read(tmp_path / "metrics.jsonl")
            seen.append((lines[-1]["step"], "eval_loss" in lines[-1]))

    saver = CheckpointSaver(
        CheckpointConfig(output_dir=str(tmp_path), save_steps=1, save_hf_weights=False)
    )
    schedule = EvaluationSchedule(eval_steps=eval_steps, eval_epochs=0)
    make_trainer(MetricsRecorder(tmp_path), schedule, saver, Probe()).fit(make_module())
    assert seen == [(step, bool(eval_steps)) for step in (1, 2, 3, 4)]


def test_evaluation_and_saving_do_not_count_as_step_time(make_module, make_trainer, tmp_path):
    class Slow(Callback):
        def on_validation_start(self, trainer, pl_module):
            time.sleep(0.1)

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            time.sleep(0.1)

        def on_train_batch_start(self, trainer, *args, **kwargs):
            if trainer.global_step == 0:
                time.sleep(0.1)  # twice, once a micro-batch

    saver = CheckpointSaver(
        CheckpointConfig(output_dir=str(tmp_path), save_steps=3, save_hf_weights=False)
    )
    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    make_trainer(MetricsRecorder(tmp_path), schedule, saver, Slow()).fit(make_module())
    times = [line["step_time_s"] for line in read(tmp_path / "metrics.jsonl")]
    assert times[0] > 0.2
    assert max(times[1:]) < 0.1  # step 3 follows an evaluation, step 4 a save


def test_the_loggers_get_the_same_numbers(make_module, make_trainer, tmp_path):
    logged = []

    class Memory(DummyLogger):
        def log_metrics(self, metrics, step=None):
            if "grad_norm" in metrics:
                logged.append({"step": step} | metrics)

    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    make_trainer(MetricsRecorder(tmp_path), schedule, logger=Memory()).fit(make_module())
    assert logged == read(tmp_path / "metrics.jsonl")


def test_a_failed_evaluation_keeps_the_line_of_its_step(make_module, make_trainer, tmp_path):
    class Fails(Callback):
        def on_validation_start(self, trainer, pl_module):
            raise RuntimeError("in evaluation")

    schedule = EvaluationSchedule(eval_steps=2, eval_epochs=0)
    with pytest.raises(RuntimeError, match="in evaluation"):
        make_trainer(MetricsRecorder(tmp_path), schedule, Fails()).fit(make_module())
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_validate_writes_eval_jsonl_alone(make_module, make_trainer, tmp_path):
    for _ in range(2):
        make_trainer(MetricsRecorder(tmp_path)).validate(make_module(), verbose=False)
    assert read(tmp_path / "eval.jsonl") == [{"checkpoint": None, "eval_loss": 2.0}] * 2
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_resumed_run_moves_what_came_after_its_step(make_module, make_trainer, tmp_path, stop_at):
    config = CheckpointConfig(
        output_dir=str(tmp_path), save_steps=2, save_epochs=0, save_hf_weights=False
    )
    with pytest.raises(RuntimeError):
        make_trainer(
            MetricsRecorder(tmp_path), CheckpointSaver(config), stop_at(4, error=RuntimeError)
        ).fit(make_module())
    make_trainer(MetricsRecorder(tmp_path)).fit(
        make_module(), ckpt_path=tmp_path / "checkpoints/global_step_2", weights_only=False
    )
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl.1")] == [3, 4]


def test_a_torn_last_line_is_moved_and_the_file_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    file = MetricsFile(path)
    file.open_at(2)
    file.append({"step": 3})
    file.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.1").read_text() == '{"step": 3, "lo'


def test_a_whole_object_without_its_newline_is_torn_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    file = MetricsFile(path)
    file.open_at(2)
    file.append({"step": 3})
    file.close()
    assert [line["step"] for line in read(path)] == [1, 3]


def test_moved_lines_never_overwrite_earlier_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for _ in range(2):
        file.open_at(0)
        file.append({"step": 1})
        file.close()
    file.open_at(0)
    file.close()
    assert [read(tmp_path / f"metrics.jsonl.{k}")[0]["step"] for k in (1, 2)] == [1, 1]
    assert path.read_text() == ""


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.open_at(0)
    file.append({"step": 1})
    assert read(tmp_path / "run" / "metrics.jsonl") == [{"step": 1}]
    file.close()


def test_a_trial_run_leaves_the_numbers_of_the_real_one(make_module, make_trainer, tmp_path):
    make_trainer(MetricsRecorder(tmp_path)).fit(make_module())
    before = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl*")}
    recorder = MetricsRecorder(tmp_path)
    trial = make_trainer(recorder, fast_dev_run=2, accumulate_grad_batches=1)
    trial.fit(make_module())
    trial.validate(make_module(), verbose=False)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.jsonl*")} == before
    assert recorder.numbers["step"] == 2


H100 = Machine("cuda", sm=90, name="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("machine", "has_mfu"), [(H100, True), (Machine("cuda", sm=75), False), (Machine(), False)]
)
def test_speed_is_work_over_the_whole_step_and_mfu_its_share_of_a_known_peak(
    make_module, make_trainer, tmp_path, machine, has_mfu
):
    module = make_module()
    module.flops = 3e12
    make_trainer(MetricsRecorder(tmp_path, machine=machine)).fit(module)
    for line in read(tmp_path / "metrics.jsonl"):
        assert line["tflops_per_second"] == pytest.approx(3 / line["step_time_s"])
        assert ("mfu" in line) is has_mfu
        if has_mfu:
            assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 989)


def test_mfu_is_over_the_peaks_of_all_ranks(tmp_path):
    recorder = MetricsRecorder(tmp_path)
    recorder._peak = 500e12
    assert recorder._speed(4e15, 2.0, 8) == {"tflops_per_second": 2000, "mfu": 0.5}
    assert recorder._speed(None, 2.0, 8) == {}
