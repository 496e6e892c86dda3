"""The steps that were asked for are in a trace, and the profiler is stopped whatever happens."""

from __future__ import annotations

import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from omnilit.callbacks.metrics import MetricsRecorder
from omnilit.callbacks.profiler import StepProfiler
from omnilit.callbacks.step_trace import StepTrace
from omnilit.config import ProfileConfig
from omnilit.errors import CheckpointError


@pytest.fixture
def profiler_for(tmp_path):
    """A profiler into `trace/`, of ops alone unless asked for more."""

    def make(start, end, **over):
        folder = over.pop("trace_dir", str(tmp_path / "trace"))
        plain = {"record_shapes": False, "profile_memory": False, "with_stack": False}
        config = ProfileConfig(start_step=start, end_step=end, trace_dir=folder, **(plain | over))
        return StepProfiler(config)

    return make


def events_of(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_in(folder):
    """By file name, the steps that its trace holds."""
    return {
        path.name: sorted(
            {
                int(event["name"].partition("#")[2])
                for event in events_of(path)
                if event["name"].startswith("ProfilerStep#")
            }
        )
        for path in folder.glob("*")
    }


def is_profiling():
    return torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (3, 5, {"rank0_steps_3_to_4.json.gz": [3, 4]}),
        (1, 2, {"rank0_steps_1_to_1.json.gz": [1]}),  # no room for a warm-up
        (2, 3, {"rank0_steps_2_to_2.json.gz": [2]}),
        (7, 20, {"rank0_steps_7_to_8.json.gz": [7, 8]}),  # the run ends inside
        (8, 9, {"rank0_steps_8_to_8.json.gz": [8]}),
        (9, 10, {}),  # ... in its warm-up
        (20, 30, {}),
        (3, 3, {}),
    ],
)
def test_exactly_the_steps_of_the_range_are_recorded(
    make_module, make_trainer, profiler_for, tmp_path, start, end, expected
):
    make_trainer(profiler_for(start, end), max_epochs=2).fit(make_module())  # 8 steps
    assert steps_in(tmp_path / "trace") == expected
    assert not is_profiling()


@pytest.mark.parametrize(
    ("fails_at", "expected"),
    [
        (1, {}),  # in the warm-up
        (2, {"rank0_steps_3_to_3.json.gz": [3]}),
        (3, {"rank0_steps_3_to_4.json.gz": [3, 4]}),
        (7, {"rank0_steps_3_to_5.json.gz": [3, 4, 5]}),  # behind it
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_what_it_recorded(
    make_module, make_trainer, profiler_for, tmp_path, fails_at, expected, error
):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == fails_at:
                raise error("as asked")

    trainer = make_trainer(profiler_for(3, 6), Fails(), max_epochs=2)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(make_module())
    assert steps_in(tmp_path / "trace") == expected
    assert not is_profiling()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (3, {}),
        (4, {"rank0_steps_5_to_5.json.gz": [5]}),
        (6, {"rank0_steps_6_to_7.json.gz": [6, 7]}),
    ],
)
def test_a_resumed_run_records_what_is_left_of_the_range(
    make_module, make_trainer, profiler_for, tmp_path, start, expected, caplog
):
    trainer = make_trainer()
    trainer.fit(make_module())
    trainer.save_checkpoint(tmp_path / "step4.ckpt")
    resumed = make_trainer(profiler_for(start, start + 2), max_epochs=2)
    resumed.fit(make_module(), ckpt_path=tmp_path / "step4.ckpt", weights_only=False)
    assert steps_in(tmp_path / "trace") == expected
    is_past = "nothing is recorded: the run goes on from step 4" in caplog.text
    assert is_past is (start == 3)


@pytest.mark.parametrize("field", ["record_shapes", "profile_memory", "with_stack"])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_trace_holds_what_was_asked_for(
    make_module, make_trainer, profiler_for, tmp_path, field, is_on
):
    make_trainer(profiler_for(2, 3, **{field: is_on})).fit(make_module())
    (path,) = (tmp_path / "trace").glob("*")
    events = events_of(path)
    assert "aten::mul" in {event["name"] for event in events}
    has = {
        "record_shapes": any("Input Dims" in event.get("args", {}) for event in events),
        "profile_memory": any(event["name"] == "[memory]" for event in events),
        "with_stack": any("training_step" in event["name"] for event in events),
    }
    assert [name for name, found in has.items() if found] == [field] * is_on


def test_an_earlier_runs_trace_stays(make_module, make_trainer, profiler_for, tmp_path):
    for _ in range(2):
        make_trainer(profiler_for(2, 3)).fit(make_module())
    names = ["rank0_steps_2_to_2.2.json.gz", "rank0_steps_2_to_2.json.gz"]
    assert sorted(steps_in(tmp_path / "trace")) == names


def test_the_folder_is_relative_to_the_working_directory(
    make_module, make_trainer, profiler_for, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_trainer(profiler_for(2, 3, trace_dir="./trace")).fit(make_module())
    assert len(list((tmp_path / "here" / "trace").iterdir())) == 1


def test_a_trial_run_leaves_no_trace(make_module, make_trainer, profiler_for, tmp_path):
    trainer = make_trainer(profiler_for(1, 2), fast_dev_run=2, accumulate_grad_batches=1)
    trainer.fit(make_module())
    assert not (tmp_path / "trace").exists()


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_step(
    make_module, make_trainer, profiler_for, tmp_path
):
    (tmp_path / "trace").write_text("a file")
    module = make_module()
    with pytest.raises(CheckpointError, match=r"making train\.profile\.trace_dir failed"):
        make_trainer(profiler_for(2, 3)).fit(module)
    assert module.step_result is None


def test_a_trace_that_cannot_be_written_costs_the_trace_alone(
    make_module, make_trainer, profiler_for, monkeypatch, caplog
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    module = make_module()
    make_trainer(profiler_for(2, 3)).fit(module)
    assert module.step_result.step == 4
    assert "cannot be written: No space left on device" in caplog.text
    assert not is_profiling()


def test_writing_the_trace_counts_for_no_step(
    make_module, make_trainer, profiler_for, tmp_path, monkeypatch
):
    real = torch.profiler.profile.export_chrome_trace

    def slow(self, path):
        time.sleep(0.2)
        return real(self, path)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", slow)
    make_trainer(MetricsRecorder(tmp_path), profiler_for(2, 3)).fit(make_module())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step_time_s"] for line in lines) < 0.2


@pytest.mark.parametrize("is_kept", [True, False])
def test_on_cuda_a_snapshot_of_the_memory_lies_beside_the_trace(tmp_path, monkeypatch, is_kept):
    calls = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **options: calls.append(options),
        _dump_snapshot=calls.append,
    )
    monkeypatch.setattr(torch.cuda, "memory", memory)
    config = ProfileConfig(
        start_step=2, end_step=3, trace_dir=str(tmp_path), with_stack=False, profile_memory=is_kept
    )
    trace = StepTrace(config, rank=1, device=torch.device("cuda"))
    for step in (1, 2, 3):
        trace.enter(step)
        trace.mark(step)
    snapshot = str(tmp_path / "rank1_steps_2_to_2.memory.pickle")
    assert calls == [{"max_entries": 100_000}, snapshot, {"enabled": None}] * is_kept
    assert [path.name for path in tmp_path.iterdir()] == ["rank1_steps_2_to_2.json.gz"]
