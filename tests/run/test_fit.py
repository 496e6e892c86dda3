"""What a user gets from `omnilit fit`, from the first line to the exported folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from omnilit.__main__ import main
from omnilit.tools import export
from tests.helpers.markup import parse
from tests.run.conftest import read_lines

pytestmark = [pytest.mark.cli, pytest.mark.timeout(300)]
EXACT = ("step", "epoch", "loss", "grad_norm", "lr", "tokens", "skipped_steps")


def exact(lines: list[dict[str, object]]) -> list[tuple[object, ...]]:
    """What must not depend on when or how fast a step ran."""
    return [tuple(line[key] for key in EXACT) for line in lines]


@pytest.fixture(scope="module")
def finished(task, omnilit, tmp_path_factory):
    """A run of four steps, evaluated and saved every second one."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = omnilit(
        "fit", task / "config.yaml", "--train.checkpoint.output_dir", out, "--train.max_steps", 4,
        "--train.eval_steps", 2, "--train.checkpoint.save_steps", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_the_run_folder_holds_what_is_promised(finished):
    out, _ = finished
    names = {"checkpoints", "config.yaml", "config.resolved.yaml", "metrics.jsonl", "model_assets"}
    assert names | {"run.lock", "tensorboard"} == {path.name for path in out.iterdir()}
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == ["global_step_2", "global_step_4"]
    assert (out / "checkpoints" / "global_step_4" / "COMPLETE").is_file()
    assert (out / "checkpoints" / "global_step_4" / "hf_ckpt" / "COMPLETE").is_file()
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["max_steps"] == 4


def test_a_line_of_metrics_has_exactly_its_keys(finished):
    lines = read_lines(finished[0])
    always = {
        "step", "epoch", "loss", "grad_norm", "lr", "lr/backbone", "tokens", "tokens_per_second",
        "tflops_per_second", "step_time_s", "data_wait_s", "max_memory_gib", "skipped_steps",
    }  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line.keys() == (always if line["step"] % 2 else always | {"eval_loss"})


def test_the_log_shows_what_was_chosen_and_every_step(finished):
    _, log = finished
    for title in ("Mesh", "Kernels", "Parameters", "Data", "First sample"):
        assert f"\n{title}\n" in log
    assert "[[" in log
    assert log.count("\nstep ") == 4
    assert "Traceback" not in log
    assert "Warning" not in log


def test_the_report_shows_the_run(finished, task, tmp_path):
    out, _ = finished
    page = tmp_path / "report.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    structure = parse(page.read_text())
    texts = structure.texts
    tags = [tag for tag, _ in structure.seen]
    assert tags.count("figure") == 10
    assert f"{read_lines(out)[-1]['loss']:.5g}" in texts["td"]
    for text in ("global_step_4", "complete", "hf_ckpt", "attn_implementation", "processes"):
        assert text in texts["td"]
    assert f"{task / 'train.jsonl'}:1; " in texts["h3"]
    assert "<|im_end|>" in texts["mark"]


def test_the_export_answers(finished, omnilit):
    out, _ = finished
    words = ("--infer.do_sample", "false", "--infer.max_tokens", 8, "--prompt", "the quick")
    done = omnilit("infer", "--infer.model_path", out, *words)
    assert done.returncode == 0, done.stderr
    assert "global_step_4" in done.stderr
    assert done.stdout.strip()


def test_export_makes_the_same_files_of_the_checkpoint(finished, tmp_path):
    out, _ = finished
    assert export.run([str(out), str(tmp_path / "again")]) == 0
    made, own = tmp_path / "again", out / "checkpoints" / "global_step_4" / "hf_ckpt"
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {
        p.name: p.read_bytes() for p in own.iterdir()
    }


def test_validate_gives_the_last_evaluations_number(finished, task, omnilit):
    out, _ = finished
    done = omnilit(
        "validate", task / "config.yaml", "--train.checkpoint.output_dir", out,
        "--train.checkpoint.load_path", "auto",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in (out / "eval.jsonl").read_text().splitlines()]
    assert line["eval_loss"] == read_lines(out)[-1]["eval_loss"]
    assert f"eval_loss {line['eval_loss']:.4f}" in done.stderr


def test_two_processes_train_the_same_steps(finished, task, omnilit, tmp_path):
    done = omnilit(
        "fit", task / "config.yaml", "--train.checkpoint.output_dir", tmp_path / "run",
        "--train.max_steps", 4, "--train.eval_steps", 2, "--trainer.accelerator", "cpu",
        "--trainer.devices", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(read_lines(tmp_path / "run"), read_lines(finished[0]), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for key in ("loss", "grad_norm", *(["eval_loss"] if "eval_loss" in theirs else [])):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


def test_a_bad_line_ends_all_processes_with_its_place(task, omnilit, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((task / "train.jsonl").read_text() + '{"messages": [\n')
    started = time.monotonic()
    done = omnilit(
        "fit", task / "config.yaml", "--train.checkpoint.output_dir", tmp_path / "run",
        "--data.train_path", bad, "--trainer.devices", 2, "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{bad}:81: " in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 120


def test_mistakes_are_listed_together_and_exit_with_2(task, omnilit):
    done = omnilit(
        "fit", task / "config.yaml", "--train.optimizer.lr", "fast", "--train.sead", 1,
        "--data.train_path", "nowhere.jsonl", "--trainer.precision", "bf16",
        "--train.eval_steps", -1,
    )  # fmt: skip
    assert done.returncode == 2
    first, *problems = done.stderr.splitlines()
    assert first == "error: 5 problems"
    assert len(problems) == 5


def spoil(task: Path, environment: dict[str, str], out: Path, workers: int) -> list[str]:
    """Start a run and kill it, with no chance to clean up, between its first and second save."""
    words = [
        "fit", task / "config.yaml", "--train.checkpoint.output_dir", out,
        "--data.train_size", 30_000, "--train.checkpoint.save_steps", 80,
        "--train.checkpoint.save_hf_weights", "false", "--data.dataloader.num_workers", workers,
        "--train.checkpoint.load_path", "auto",
    ]  # fmt: skip
    command = [sys.executable, "-m", "omnilit", *map(str, words)]
    with (out.parent / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stderr=log, stdout=log, start_new_session=True
        )
        metrics, end = out / "metrics.jsonl", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if metrics.exists() and metrics.read_text().count("\n") >= 100:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def undisturbed(task, omnilit, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = omnilit(
        "fit", task / "config.yaml", "--train.checkpoint.output_dir", out,
        "--data.train_size", 30_000, "--train.checkpoint.save_hf_weights", "false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return exact(read_lines(out))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_to_the_bit(
    workers, task, environment, omnilit, undisturbed, tmp_path
):
    out = tmp_path / "run"
    words = spoil(task, environment, out, workers)
    seen = len(read_lines(out)) if out.exists() else 0
    assert 80 < seen < len(undisturbed), (tmp_path / "log").read_text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["global_step_80"]
    done = omnilit(*words)
    assert done.returncode == 0, done.stderr
    assert exact(read_lines(out)) == undisturbed
    assert len((out / "metrics.jsonl.1").read_text().splitlines()) >= seen - 80
