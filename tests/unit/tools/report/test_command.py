from pathlib import Path

import pytest

from omnilit.__main__ import main
from omnilit.errors import ConfigError
from omnilit.tools.report.command import Request, parse_request
from tests.helpers.runs import write_run


def problems(*words):
    with pytest.raises(ConfigError) as caught:
        parse_request(words)
    return [(problem.key, problem.problem) for problem in caught.value.problems]


def test_folders_come_first_and_flags_after_them():
    assert parse_request(["a", "b"]) == Request((Path("a"), Path("b")), Path("report.html"), 3)
    assert parse_request(["a", "--out", "x.html", "--samples=0"]) == Request(
        (Path("a"),), Path("x.html"), 0
    )


def test_all_wrong_words_are_told_together():
    assert problems("--outt", "x", "--samples", "-1", "--config", "a.yaml") == [
        ("--outt", "report has no such flag. Did you mean 'out'?"),
        ("--config", "report has no such flag."),
        ("RUN_DIR", "no run is given"),
        ("--samples", "-1 is below 0"),
    ]
    assert problems("a", "--out") == [("--out", "needs one value")]
    assert problems("a", "--samples", "many")[0][0] == "--samples"
    assert problems("a", "--print_config")[0][0] == "--print_config"


def test_a_wrong_flag_without_a_near_one_ends_in_one_full_stop():
    with pytest.raises(ConfigError, match=r"--bogus: report has no such flag\. To fix: leave"):
        parse_request(["a", "--bogus", "1"])


def test_help_names_the_flags(capsys):
    assert main(["report", "--help"]) == 0
    text = capsys.readouterr().out
    assert "omnilit report RUN_DIR..." in text
    assert "--out FILE" in text
    assert "--samples N" in text


def test_the_verb_writes_the_page_and_prints_the_summary(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    assert main(["report", *map(str, runs)]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("Summary\n")
    assert "first" in output.out
    assert "last step" in output.out
    assert output.err == "page: report.html\n"
    page = (tmp_path / "report.html").read_text()
    assert "<title>2 runs</title>" in page
    assert "No samples can be shown: " in page


def test_without_samples_the_data_is_not_looked_for(tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    words = [str(write_run(tmp_path / "a")), "--samples", "0", "--out", str(out)]
    assert main(["report", *words]) == 0
    assert "Training data" not in out.read_text()


def test_a_folder_that_holds_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert f"RUN_DIR: {tmp_path / 'empty'} holds no run" in error
    assert not (tmp_path / "x.html").exists()


def test_a_page_that_cannot_be_written_is_told(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    words = [str(run), "--samples", "0", "--out", str(run / "metrics.jsonl" / "x.html")]
    assert main(["report", *words]) == 2
    assert "--out: " in capsys.readouterr().err
