import logging
from typing import Any

import pytest

from omnilit.checkpoint.layout import (
    check_fresh,
    check_writable,
    find_latest,
    holds_run,
    is_own_checkpoint,
    move_later_steps,
    move_run_aside,
    prune,
    publish,
    resolve_load_path,
    stage,
    staging_of,
    step_folder,
)
from omnilit.checkpoint.manifest import COMPLETE, files_below, seal_files
from omnilit.config.machine_checks import check_other_run
from omnilit.errors import CheckpointError, ConfigError


def save(output_dir, step, content="x" * 100):
    final = step_folder(output_dir, step)
    staging = stage(final)
    (staging / "tensors").mkdir()
    (staging / "tensors" / "a.bin").write_text(content)
    (staging / "meta.pt").write_text("meta")
    publish(staging, final, seal_files(staging, files_below(staging)))
    return final


def export(output_dir, step, text="weights"):
    final = step_folder(output_dir, step) / "hf_ckpt"
    staging = stage(final)
    (staging / "model.safetensors").write_text(text)
    publish(staging, final, seal_files(staging, files_below(staging)))
    return final


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_published_step_is_whole_and_leaves_no_staging(tmp_path):
    final = save(tmp_path, 5)
    assert names(final) == [COMPLETE, "meta.pt", "tensors"]
    assert names(final.parent) == ["global_step_5"]
    assert find_latest(tmp_path).path == final


def test_the_newest_step_is_found_by_number_not_by_name(tmp_path):
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    found = find_latest(tmp_path)
    assert (found.path, found.passed_over) == (newest, ())


def test_nothing_saved_is_nothing_found(tmp_path):
    assert find_latest(tmp_path).path is None


def spoil_flip(folder):
    path = folder / "tensors" / "a.bin"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def spoil_truncate(folder):
    path = folder / "tensors" / "a.bin"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_flip, "a.bin has a wrong checksum"),
        (spoil_truncate, "a.bin has 99 bytes instead of 100"),
        (lambda f: (f / "tensors" / "a.bin").unlink(), "a.bin cannot be read (No such file"),
        (lambda f: (f / COMPLETE).unlink(), "it has no COMPLETE: the run ended while saving"),
        (lambda f: (f / COMPLETE).write_text("{"), "its COMPLETE is not readable"),
        (lambda f: (f / COMPLETE).write_text("[]"), "its COMPLETE is not readable"),
        (lambda f: f.rename(staging_of(f)), "the run ended before it was published"),
    ],
)
def test_a_damaged_step_is_passed_over_with_the_reason(tmp_path, spoil, reason):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    spoil(bad)
    found = find_latest(tmp_path)
    assert found.path == good
    assert [reason in text for _, text in found.passed_over] == [True]


def test_auto_says_what_it_passes_over(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    good = save(tmp_path, 1)
    spoil_flip(save(tmp_path, 2))
    assert resolve_load_path("auto", tmp_path) == good
    assert "global_step_2: a.bin has a wrong checksum" in caplog.text


def test_an_export_alone_is_no_checkpoint_and_not_mentioned(tmp_path):
    good = save(tmp_path, 1)
    export(tmp_path, 2)
    found = find_latest(tmp_path)
    assert (found.path, found.passed_over) == (good, ())


def test_a_save_takes_an_earlier_export_of_its_step_along(tmp_path):
    exported = export(tmp_path, 3)
    final = save(tmp_path, 3)
    assert (exported / "model.safetensors").read_text() == "weights"
    assert find_latest(tmp_path).path == final


def test_an_export_after_the_save_leaves_the_checkpoint_good(tmp_path):
    final = save(tmp_path, 3)
    export(tmp_path, 3)
    assert find_latest(tmp_path).path == final
    export(tmp_path, 3, text="again")
    assert (final / "hf_ckpt" / "model.safetensors").read_text() == "again"
    assert names(final) == [COMPLETE, "hf_ckpt", "meta.pt", "tensors"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    spoil_flip(save(tmp_path, 3))
    final = save(tmp_path, 3, content="new")
    assert (final / "tensors" / "a.bin").read_text() == "new"
    assert find_latest(tmp_path).path == final
    assert names(final.parent) == ["global_step_3"]


def test_leftovers_of_a_killed_run_go_at_the_next_save(tmp_path):
    killed = stage(step_folder(tmp_path, 1))
    (killed / "half").write_text("...")
    (killed / "hf_ckpt").mkdir()
    (killed / "hf_ckpt" / "kept").write_text("an export that was moving along")
    save(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["global_step_1", "global_step_2"]
    assert names(step_folder(tmp_path, 1)) == ["hf_ckpt"]
    assert (step_folder(tmp_path, 1) / "hf_ckpt" / "kept").exists()


def test_in_a_folder_of_the_users_only_own_leftovers_go(tmp_path):
    for name in (".staging-out", ".replaced-out", ".staging-theirs", ".replaced-theirs"):
        (tmp_path / name).mkdir()
    stage(tmp_path / "out")
    assert names(tmp_path) == [".replaced-theirs", ".staging-out", ".staging-theirs"]


def steps(output_dir):
    return sorted(int(path.name.split("_")[-1]) for path in (output_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (4, [5, 10, 20, 30])])
def test_the_newest_checkpoints_are_kept_by_number(keep, left, tmp_path):
    for step in (5, 10, 20):
        save(tmp_path, step)
    prune(save(tmp_path, 30), keep=keep)
    assert steps(tmp_path) == left


def test_pruning_keeps_exports_and_what_is_no_complete_checkpoint(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    exported = export(tmp_path, 1)
    export(tmp_path, 4)
    unknown = step_folder(tmp_path, 2)
    (unknown / COMPLETE).unlink()
    other = tmp_path / "checkpoints" / "best"
    other.mkdir()
    prune(save(tmp_path, 5), keep=1)
    assert names(step_folder(tmp_path, 1)) == ["hf_ckpt"]
    assert (exported / "model.safetensors").read_text() == "weights"
    assert names(step_folder(tmp_path, 4)) == ["hf_ckpt"]
    assert names(unknown) == ["meta.pt", "tensors"]
    assert other.is_dir()
    assert not step_folder(tmp_path, 3).exists()
    assert find_latest(tmp_path).path == step_folder(tmp_path, 5)


def test_what_cannot_be_pruned_is_told_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    old = save(tmp_path, 1)
    in_the_way = old.with_name(".replaced-global_step_1")
    in_the_way.mkdir()
    (in_the_way / "open file").touch()
    newest = step_folder(tmp_path, 2)
    prune(newest, keep=1)
    assert f"keep_last: {old} cannot be removed: Directory not empty" in caplog.text
    prune(save(tmp_path, 2), keep=1)
    assert steps(tmp_path) == [2]


def test_a_file_without_seal_is_not_published(tmp_path):
    final = step_folder(tmp_path, 1)
    staging = stage(final)
    (staging / "stray").write_text("x")
    with pytest.raises(CheckpointError, match="not sealed: stray"):
        publish(staging, final, {})
    assert not final.exists()


def test_null_starts_anew(tmp_path):
    save(tmp_path, 1)
    assert resolve_load_path(None, tmp_path) is None


def test_an_explicit_step_is_taken(tmp_path):
    older, _ = save(tmp_path, 1), save(tmp_path, 2)
    assert resolve_load_path(str(older), tmp_path) == older


def test_an_explicit_path_that_is_not_there_names_what_is(tmp_path):
    there = save(tmp_path, 4)
    gone = step_folder(tmp_path, 5)
    with pytest.raises(ConfigError) as caught:
        resolve_load_path(str(gone), tmp_path)
    assert f"load_path: {gone} does not exist" in str(caught.value)
    assert str(there) in str(caught.value)


def test_an_explicit_damaged_step_is_refused_with_the_reason(tmp_path):
    there, bad = save(tmp_path, 1), save(tmp_path, 2)
    spoil_truncate(bad)
    with pytest.raises(ConfigError) as caught:
        resolve_load_path(str(bad), tmp_path)
    assert "global_step_2 cannot be loaded: a.bin has 99 bytes" in str(caught.value)
    assert str(caught.value).endswith(f"one of: {there}.")


def test_a_new_run_is_kept_out_of_anothers_checkpoints(tmp_path):
    check_fresh(tmp_path, overwrite=False)
    save(tmp_path, 7)
    check_fresh(tmp_path, overwrite=True)
    with pytest.raises(ConfigError) as caught:
        check_fresh(tmp_path, overwrite=False)
    settings = {
        "train.checkpoint.load_path": None,
        "train.checkpoint.overwrite": False,
        "train.checkpoint.output_dir": str(tmp_path),
    }
    view: Any = type("GivenView", (dict,), {"verb": "fit"})(settings)
    assert list(caught.value.problems) == check_other_run(view)
    elsewhere = tmp_path / "other" / "global_step_1"
    with pytest.raises(ConfigError, match=r"load_path is .*other/global_step_1, which is not one"):
        check_fresh(tmp_path, overwrite=False, load_path=elsewhere)


def test_all_of_an_earlier_run_moves_aside_under_one_number(tmp_path):
    assert not holds_run(tmp_path)
    save(tmp_path, 7)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "metrics.jsonl.1").write_text("lines after a step")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    move_run_aside(tmp_path)
    moved = ["checkpoints.2", "metrics.jsonl.2", "tensorboard.2"]
    assert names(tmp_path) == sorted(["config.yaml", "metrics.jsonl.1", *moved])
    assert not holds_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert holds_run(tmp_path)  # killed before its first save
    move_run_aside(tmp_path)
    assert names(tmp_path) == sorted(["config.yaml", "metrics.jsonl.1", *moved, "metrics.jsonl.3"])


def test_steps_after_the_one_loaded_move_aside_with_their_exports(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    for step in (200, 300, 1000):
        save(tmp_path, step)
    spoil_flip(save(tmp_path, 400))
    export(tmp_path, 1000)
    export(tmp_path, 1200)
    stage(step_folder(tmp_path, 1300))
    loaded = step_folder(tmp_path, 300)
    move_later_steps(tmp_path, step=300, loaded=loaded)
    assert names(tmp_path) == ["checkpoints", "checkpoints.1"]
    assert names(tmp_path / "checkpoints") == ["global_step_200", "global_step_300"]
    aside = tmp_path / "checkpoints.1"
    later = [f"global_step_{step}" for step in (1000, 1200, 400)]
    assert names(aside) == [".staging-global_step_1300", *later]
    assert (aside / "global_step_1000" / "hf_ckpt" / COMPLETE).is_file()
    assert "goes on from step 300: global_step_400, global_step_1000" in caplog.text
    move_later_steps(tmp_path, step=300, loaded=loaded)
    assert names(tmp_path) == ["checkpoints", "checkpoints.1"]
    move_later_steps(tmp_path, step=200, loaded=loaded)  # it was loaded, whatever its name says
    assert names(tmp_path / "checkpoints") == ["global_step_200", "global_step_300"]


def test_a_checkpoint_is_a_runs_own_by_where_it_lies(tmp_path):
    own = save(tmp_path / "run", 3)
    (tmp_path / "newest").symlink_to(own)
    assert is_own_checkpoint(own, tmp_path / "run")
    assert is_own_checkpoint(tmp_path / "newest", tmp_path / "run")
    assert not is_own_checkpoint(own, tmp_path)
    assert not is_own_checkpoint(tmp_path / "run" / "checkpoints.1" / "global_step_3", tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .* cannot be written to \(Not a dir"):
        check_writable(tmp_path / "file" / "out")


def test_a_folder_without_room_is_refused_with_both_sizes(tmp_path):
    check_writable(tmp_path, num_bytes=1)
    with pytest.raises(ConfigError, match=r"GiB free, one checkpoint takes 1048576\.0"):
        check_writable(tmp_path, num_bytes=2**50)
    assert names(tmp_path) == []
