from pathlib import Path

import numpy as np
import pytest

from omnilit.cli.plan import make_data_view
from omnilit.errors import ConfigError
from omnilit.tools.data import find_refusals, help_text, parse_request, run
from omnilit.tools.data_report import PartReport, SourceData


def problems_of(call, *argv):
    with pytest.raises(ConfigError) as caught:
        call([str(word) for word in argv])
    return [str(problem) for problem in caught.value.problems]


def check(argv):
    return make_data_view(parse_request(argv).command)


def part(num_bad, num_records=100):
    none = np.zeros(0, np.int64)
    return PartReport("train", (SourceData("a", none, none, none, num_records, num_bad=num_bad),))


def test_own_flags_are_taken_out_and_the_others_stay():
    request = parse_request(
        ["--config", "a.yaml", "--show", "3", "--data.max_seq_len", "9", "--html=b/c.html"]
    )
    assert (request.num_shown, request.html, request.png) == (3, Path("b/c.html"), None)
    assert request.command.files == (Path("a.yaml"),)
    assert request.command.flags == (("data.max_seq_len", ("9",)),)


@pytest.mark.parametrize(
    ("words", "png"),
    [
        (["--png", "x.png"], Path("x.png")),
        (["--png"], Path("data_lengths.png")),
        (["--png", "--html", "out/page.html"], Path("out/data_lengths.png")),
        (["--html", "out/page.html"], None),
    ],
)
def test_the_png_is_written_where_asked_or_beside_the_page(words, png):
    assert parse_request(words).png == png


def test_wrong_flags_are_told_together():
    found = problems_of(
        parse_request, "--show", "many", "--html", "--print_config", "--help", "trainer"
    )
    assert found == [
        "--print_config: data prints no configuration. To fix: use omnilit fit --print_config.",
        "--help: there is no group 'trainer', but one page. To fix: give --help alone.",
        "--show: 'many' is not a whole number. To fix: write a whole number.",
        "--html: needs one value. To fix: write --html VALUE.",
    ]
    assert problems_of(parse_request, "--show", -1) == [
        "--show: -1 is below 0. To fix: give the number of samples."
    ]


def test_help_shows_what_the_verb_reads_and_no_more(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == help_text(parse_request(["--help"]).command)
    for word in ("--show N", "--html FILE", "--png [FILE]", "--data.train_path", "--train.dyn_bsz"):
        assert word in text
    for word in ("optimizer", "accelerator", "ops_implementation", "output_dir "):
        assert f"--train.{word}" not in text


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.yaml").write_text(
        f"model: {{config_path: {tmp_path}/model}}\n"
        f"data: {{train_path: {tmp_path}/a.jsonl}}\n"
        "train: {accelerator: {dp_shard_size: 64}, checkpoint: {output_dir: /proc/none}}\n"
        "trainer: {accelerator: cuda, devices: 64}\n"
    )
    return tmp_path / "a.yaml"


def test_devices_and_output_do_not_matter(config):
    assert check(["--config", str(config)])["data.train_path"].endswith("a.jsonl")


@pytest.mark.parametrize("data_type", ["classification", "dpo", "diffusion"])
def test_data_of_later_tasks_can_be_looked_at(config, data_type):
    view = check(["--config", str(config), "--data.data_type", data_type])
    assert view["data.data_type"] == data_type


def test_mistakes_in_the_data_and_misspelled_keys_are_told_together(config):
    found = problems_of(
        check, "--config", config, "--data.train_path", config.parent / "none.jsonl",
        "--data.max_seq_len", 1, "--train.sed", 3, "--data.chat_template", "plane",
        "--train.optimizer.lr_min", 9,
    )  # fmt: skip
    assert [line.partition(":")[0] for line in found] == [
        "train.sed",
        "data.max_seq_len",
        "data.chat_template",
        "data.train_path",
    ]


def test_data_must_be_named():
    (problem,) = problems_of(check, "--model.tokenizer_path", ".")
    assert problem.startswith("data.train_path: no training data is given")


def test_good_data_is_not_refused():
    assert find_refusals([part(0), part(0, 0)], is_silent=False, max_bad_fraction=0.01) == []


def test_one_bad_record_is_refused_unless_it_is_skipped():
    assert find_refusals([part(1)], is_silent=False, max_bad_fraction=0.01) == [
        "train: 1 of 100 records is bad, and data.silent_exception is false"
    ]
    assert find_refusals([part(1)], is_silent=True, max_bad_fraction=0.01) == []


def test_too_many_bad_records_are_refused_though_they_are_skipped():
    assert find_refusals([part(2)], is_silent=True, max_bad_fraction=0.01) == [
        "train: 2 of 100 records are bad, more than data.max_bad_fraction 0.01"
    ]
