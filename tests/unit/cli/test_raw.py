import pytest

from omnilit.cli.raw import merge, read_command
from omnilit.config.schema import Field
from omnilit.errors import ConfigError


def given(tmp_path, text, *flags):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return merge(read_command(["--config", str(file), *flags]))


def test_flags_lie_over_files_and_later_files_over_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {seed: 1, micro_batch_size: 2}")
    second.write_text("train: {seed: 3}")
    words = ["--config", str(first), "--config", str(second), "--train.optimizer.lr=1e-5"]
    raw = merge(read_command(words))
    assert raw.resolved == {
        "train": {"seed": 3, "micro_batch_size": 2, "optimizer": {"lr": "1e-5"}}
    }


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--a.b", "null"], None),
        (["--a.b", "[x, y]"], ["x", "y"]),
        (["--a.b", "x", "y"], ["x", "y"]),
        (["--a.b"], True),
        (["--a.b", "-1"], -1),
        (["--a.b", "What is 1: 2?"], "What is 1: 2?"),
        (["--a.b", "'it"], "'it"),
    ],
)
def test_the_value_of_an_unknown_key_is_yaml_else_text(words, value):
    assert merge(read_command(words)).resolved == {"a": {"b": value}}


def test_the_value_of_a_known_key_is_what_its_field_takes():
    fields = [Field("a.b", str, "", False, ""), Field("model.c", list[str], [], False, "")]
    words = ["--a.b", "null", "--model.init_args.c", "1", "--model", "X", "--a.d", "null"]
    assert merge(read_command(words), fields).resolved == {
        "a": {"b": "null", "d": None},
        "model": {"class_path": "X", "init_args": {"c": ["1"]}},
    }


def test_a_word_without_a_flag_is_refused():
    with pytest.raises(ConfigError, match=r"'train\.yaml' belongs to no flag"):
        read_command(["train.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1", "is not valid YAML.*line 1"),
        ("- 1", "holds a list, not groups of settings"),
    ],
)
def test_a_file_that_holds_no_groups_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        given(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        merge(read_command(["--config", str(tmp_path / "nowhere.yaml")]))


def test_interpolations_are_resolved_and_kept_as_written(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_OUT", "here")
    raw = given(tmp_path, "train: {seed: 5, checkpoint: {output_dir: '${oc.env:RUN_OUT}/x'}}")
    assert raw.resolved["train"]["checkpoint"]["output_dir"] == "here/x"
    assert raw.written["train"]["checkpoint"]["output_dir"] == "${oc.env:RUN_OUT}/x"


def test_the_model_group_is_found_under_both_of_its_names(tmp_path):
    text = "{model: {config_path: c}, data: {train_path: '${model.config_path}/d'}}"
    for flags in ((), ("--model", "SFTModule")):
        assert given(tmp_path, text, *flags).resolved["data"] == {"train_path": "c/d"}


def test_a_whole_group_may_be_an_interpolation(tmp_path):
    raw = given(tmp_path, "{a: {b: [1, 2], c: {d: 3}}, e: '${a.b}', f: '${a.c}'}")
    assert raw.resolved["e"] == [1, 2]
    assert type(raw.resolved["e"]) is list
    assert type(raw.resolved["f"]) is dict


def test_a_missing_variable_names_the_key_and_the_way_out(tmp_path):
    raw = given(tmp_path, "data: {train_path: '${oc.env:NO_SUCH_VARIABLE}'}")
    (problem,) = raw.problems
    assert problem.key == "data.train_path"
    assert "NO_SUCH_VARIABLE" in problem.problem
    assert "set that environment variable" in problem.fix


@pytest.mark.parametrize("words", [["--model", "DPOModule", "--model.model_path", "m"]])
def test_naming_the_task_by_flag_keeps_what_the_file_says_of_the_model(tmp_path, words):
    raw = given(tmp_path, "model: {config_path: c}", *words)
    init_args = {"config_path": "c", "model_path": "m"}
    assert raw.resolved == {"model": {"class_path": "DPOModule", "init_args": init_args}}


def test_help_and_print_config_are_taken_out():
    command = read_command(["--help", "trainer", "--print_config", "--train.seed", "1"])
    assert command.help_group == "trainer"
    assert command.is_print_config
    assert command.flags == (("train.seed", ("1",)),)
