import json

import pytest

from omnilit.checkpoint.stored import pack_plain
from omnilit.data.quarantine import BadRecord, Quarantine
from omnilit.errors import ConfigError
from omnilit.tools.report.runs import SavedStep, name_runs, read_run, read_runs
from tests.helpers.runs import step_line, write_lines, write_run


def write_step(folder, step, *, is_complete=True, has_export=False, meta=None):
    path = folder / "checkpoints" / f"global_step_{step}"
    path.mkdir(parents=True)
    if meta is not None:
        (path / "meta.pt").write_bytes(pack_plain("meta.pt", meta))
    if is_complete:
        (path / "COMPLETE").write_text("{}")
    if has_export:
        (path / "hf_ckpt").mkdir()
        (path / "hf_ckpt" / "COMPLETE").write_text("12345678")
    return path


def meta(world_size):
    versions = {"omnilit": "0.1", "torch": "2.13"}
    saved_by = {"world_size": world_size, "data_size": 1, "versions": versions}
    return {"saved_by": saved_by, "omnilit": {"kernels": {"attn_implementation": "sdpa"}}}


def test_a_whole_run_is_read(tmp_path):
    folder = write_run(tmp_path / "a")
    write_step(folder, 20, meta=meta(4), has_export=True)
    run = read_run(folder, "a")
    assert (run.name, run.folder, run.metrics.last_step) == ("a", folder, 20)
    assert run.settings.values["train.optimizer.lr"] == "0.001"
    assert run.origin is not None
    assert (run.origin.world_size, run.origin.versions["torch"]) == (4, "2.13")
    assert run.origin.kernels == {"attn_implementation": "sdpa"}
    assert run.notes == ()
    assert run.written_at is not None


def test_checkpoints_are_listed_by_step_with_what_they_are(tmp_path):
    write_step(tmp_path, 100, meta=meta(1), has_export=True)
    write_step(tmp_path, 20, is_complete=False, meta=meta(1))
    write_step(tmp_path, 50, is_complete=False, has_export=True)
    (tmp_path / "checkpoints" / ".staging-global_step_120").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    saved = read_run(tmp_path, "a").saved
    assert [(s.name, s.state, s.has_export) for s in saved] == [
        ("global_step_20", "incomplete", False),
        ("global_step_50", "export alone", True),
        ("global_step_100", "complete", True),
        (".staging-global_step_120", "not finished", False),
    ]
    assert saved[1] == SavedStep("global_step_50", 50, "export alone", True, 8)


def test_the_newest_checkpoint_that_can_be_read_says_who_wrote_it(tmp_path):
    write_step(tmp_path, 10, meta=meta(2))
    write_step(tmp_path, 20, meta={"position": 20})
    (write_step(tmp_path, 30) / "meta.pt").write_bytes(b"torn")
    run = read_run(tmp_path, "a")
    assert run.origin is not None
    assert run.origin.world_size == 2
    assert [note.split()[0] for note in run.notes] == [
        "metrics.jsonl", "global_step_30", "global_step_20",
    ]  # fmt: skip


def test_an_empty_run_says_what_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path, "a")
    assert run.notes == ("metrics.jsonl holds no step yet",)
    assert run.settings.problem == "config.resolved.yaml is missing"
    assert (run.saved, run.origin, run.bad_counts, run.written_at) == ((), None, {}, None)


def test_a_torn_line_is_told(tmp_path):
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    assert read_run(folder, "a").notes == ("metrics.jsonl: lines left out that cannot be read: 1",)


def test_resumes_know_the_steps_that_they_went_on_from(tmp_path):
    folder = write_run(tmp_path / "a")
    write_lines(folder / "metrics.jsonl.1", [step_line(1)])
    write_lines(folder / "metrics.jsonl.2", [step_line(11), step_line(12)])
    write_lines(folder / "metrics.jsonl.3", [step_line(6)])
    run = read_run(folder, "a")
    assert run.resumed_at == (5, 10)
    assert len(run.set_aside) == 3


def test_bad_records_are_counted_by_source(tmp_path):
    folder = write_run(tmp_path / "a")
    sources = ["docs"] * 6 + ["chat"]
    bad = [BadRecord(source, "f.jsonl", row, "x", "y") for row, source in enumerate(sources)]
    Quarantine(folder / "quarantine.jsonl").add(bad)
    run = read_run(folder, "a")
    assert run.bad_counts == {"docs": 6, "chat": 1}
    assert [record.row for record in run.bad] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["rubbish\n", '{"source": "a"}\n', '{"sou'])
def test_what_cannot_be_read_of_a_quarantine_is_passed_over(tmp_path, text):
    folder = write_run(tmp_path / "a")
    bad = BadRecord("docs", "f.jsonl", 1, "x", "y")
    file = folder / "quarantine.jsonl"
    Quarantine(file).add([bad])
    file.write_text(text + file.read_text() if text.endswith("\n") else file.read_text() + text)
    assert read_run(folder, "a").bad == (bad,)


def test_evaluations_of_validate_are_read_and_torn_ones_told(tmp_path):
    folder = write_run(tmp_path / "a")
    line = {"checkpoint": None, "eval_loss": 1.5}
    (folder / "eval.jsonl").write_text(json.dumps(line) + '\n[]\n{"eva')
    run = read_run(folder, "a")
    assert run.evaluations == (line,)
    assert run.notes == ("eval.jsonl: a line cannot be read and is left out",)


def test_runs_are_named_by_the_shortest_ends_that_differ(tmp_path):
    assert name_runs([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
    assert name_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a")

    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("omnilit.tools.report.runs.read_metrics", refuse)  # root may read all files
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read: Permission denied"):
        read_runs([folder])


def test_all_folders_that_hold_no_run_are_told_with_runs_nearby(tmp_path):
    run = write_run(tmp_path / "out" / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    folders = [tmp_path / "out", run / "checkpoints", tmp_path / "empty", tmp_path / "file"]
    (run / "checkpoints").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_runs([*folders, tmp_path / "gone", run, run])
    problems = caught.value.problems
    assert [problem.problem.split(str(tmp_path))[1].split(":")[0] for problem in problems] == [
        "/out holds no run",
        "/out/a/checkpoints holds no run",
        "/empty holds no run",
        "/file is a file",
        "/gone does not exist",
        "/out/a is given twice",
    ]
    assert problems[0].fix == problems[1].fix == f"give {run}"
    assert problems[2].fix == "give the folder that train.checkpoint.output_dir names"
