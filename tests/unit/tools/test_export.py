import pytest

from omnilit.checkpoint.layout import publish, stage, step_folder
from omnilit.checkpoint.manifest import files_below, seal_files
from omnilit.errors import ConfigError
from omnilit.tools.export import check_out, find_assets, find_checkpoint, parse_request, run


def save(folder, name="meta.pt"):
    staging = stage(folder)
    (staging / name).write_text("{}")
    publish(staging, folder, seal_files(staging, files_below(staging)))
    return folder


def refusal(function, *args, **options):
    with pytest.raises(ConfigError) as caught:
        function(*args, **options)
    (problem,) = caught.value.problems
    return str(problem)


def test_arguments_are_read_in_any_order():
    request = parse_request(["--dtype=float32", "a", "--overwrite", "b", "--assets", "~/c"])
    assert (str(request.checkpoint), str(request.out), request.dtype) == ("a", "b", "float32")
    assert request.is_overwrite
    assert not request.trust_remote_code
    assert request.assets is not None
    assert request.assets.is_absolute()


def test_modules_are_imported_only_where_they_are_named(tmp_path, monkeypatch):
    assert parse_request(["a", "b"]).imports == []
    assert parse_request(["a", "b", "--imports", "x", "y.z"]).imports == ["x", "y.z"]
    monkeypatch.chdir(tmp_path)
    message = refusal(run, ["a", "b", "--imports", "export_nowhere"])
    assert message.startswith("imports: 'export_nowhere' cannot be imported: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: CHECKPOINT, OUT"),
        (["a"], "the following arguments are required: OUT"),
        (["a", "b", "c"], "unrecognized arguments: c"),
        (["a", "b", "--over"], "unrecognized arguments: --over"),
        (["a", "b", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
    ],
)
def test_wrong_arguments_are_refused(words, message):
    assert refusal(parse_request, words).startswith(f"export: {message}")


def test_help_is_one_page(capsys):
    assert run(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: omnilit export CHECKPOINT OUT")


def test_a_run_stands_for_its_newest_good_checkpoint_and_says_what_it_passes(tmp_path, capsys):
    good = save(step_folder(tmp_path, 9))
    bad = save(step_folder(tmp_path, 10))
    (bad / "meta.pt").write_text("[]")
    save(step_folder(tmp_path, 11) / "hf_ckpt", "config.json")
    assert find_checkpoint(tmp_path) == good
    assert f"passed over {bad}: meta.pt has a wrong checksum" in capsys.readouterr().err
    assert find_checkpoint(good) == good


def test_what_is_no_good_checkpoint_is_refused_with_the_reason(tmp_path):
    assert "gone is no folder" in refusal(find_checkpoint, tmp_path / "gone")
    exported = save(step_folder(tmp_path, 11) / "hf_ckpt", "config.json")
    for path in (exported, exported.parent):
        assert f"{exported} is in the Hugging Face layout already" in refusal(find_checkpoint, path)
    assert "has no complete checkpoint" in refusal(find_checkpoint, tmp_path)
    bad = save(step_folder(tmp_path, 12))
    (bad / "meta.pt").unlink()
    assert "global_step_12 cannot be exported: meta.pt cannot" in refusal(find_checkpoint, bad)


def test_the_models_files_are_those_of_the_run_or_those_that_are_named(tmp_path):
    folder = save(step_folder(tmp_path, 1))
    own, other = tmp_path / "model_assets", tmp_path / "model"
    message = refusal(find_assets, folder, None)
    assert message.startswith(f"--assets: {own} holds no config.json, so the run that saved")
    assert refusal(find_assets, folder, other).startswith(f"--assets: {other} holds no config.json")
    for place in (own, other):
        place.mkdir()
        (place / "config.json").touch()
    assert find_assets(folder, None) == own
    assert find_assets(folder, other) == other


def test_out_is_never_what_is_exported_nor_among_checkpoints_nor_full(tmp_path, monkeypatch):
    folder, assets = step_folder(tmp_path, 1), tmp_path / "model_assets"
    here = tmp_path / "here" / "deeper"
    for made in (folder, assets, here):
        made.mkdir(parents=True)
    monkeypatch.chdir(here)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    for out, message in {
        folder: f"would be replaced, and {folder} with it",
        tmp_path: f"would be replaced, and {folder} with it",
        assets: f"would be replaced, and {assets} with it",
        here.parent: f"would be replaced, and {here} with it",
        folder / "other": "lies among the checkpoints of a run",
        folder.parent / "other": "lies among the checkpoints of a run",
        full / "mine": "is a file",
    }.items():
        for is_overwrite in (False, True):
            found = refusal(check_out, out, folder=folder, assets=assets, is_overwrite=is_overwrite)
            assert message in found
    found = refusal(check_out, full, folder=folder, assets=assets, is_overwrite=False)
    assert "full is not empty. To fix: name another folder, or give --overwrite" in found
    check_out(full, folder=folder, assets=assets, is_overwrite=True)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty", folder / "hf_ckpt"):
        check_out(out, folder=folder, assets=assets, is_overwrite=False)
