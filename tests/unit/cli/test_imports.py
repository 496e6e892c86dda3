"""The key `imports`: what it brings in, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from omnilit.cli.main import run
from omnilit.cli.omni_cli import print_config
from omnilit.cli.plan import make_data_view, make_plan, read
from omnilit.cli.raw import Command, read_command
from omnilit.cli.resolved import resolved_tree
from omnilit.errors import ConfigError
from omnilit.plugins import IMPORTED
from omnilit.tools.infer import parse_request
from tests.helpers.plugins import forget_imports, write_module

REGISTER = """\
from omnilit.data.collate import COLLATORS
from omnilit.data.files import DATASET_TYPES
from omnilit.data.templates import CHAT_TEMPLATES
from omnilit.data.transforms import TRANSFORMS
from omnilit.kernels import RMS_NORM

RMS_NORM.register("cli_mine", "omnilit.kernels.rms_norm:eager")
DATASET_TYPES.register("cli_mine", "tests.helpers.readers:Countdown")
TRANSFORMS.register("cli_mine", "tests.helpers.own:Backwards")
COLLATORS.register("cli_mine", "tests.helpers.own:longest_first")
CHAT_TEMPLATES.register("cli_mine", "tests.helpers.own:TEMPLATE")
"""
NAMED = {
    "model.ops_implementation.rms_norm_implementation": "cli_mine",
    "data.datasets_type": "cli_mine",
    "data.transform": "cli_mine",
    "data.collator": "cli_mine",
    "data.chat_template": "cli_mine",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's configuration that Python finds modules in."""
    forget_imports(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "train.jsonl").write_text("{}\n")
    return tmp_path


def command(*words: str, **over: object) -> Command:
    tree = {
        "model": {"config_path": "."},
        "data": {"train_path": "train.jsonl"},
        "train": {"checkpoint": {"output_dir": "run"}},
        "trainer": {"accelerator": "cpu"},
        **over,
    }
    Path("my.yaml").write_text(yaml.safe_dump(tree))
    return read_command(["--config", "my.yaml", *words])


def flags(named: dict[str, str]) -> list[str]:
    return [word for path, name in named.items() for word in (f"--{path}", name)]


def test_what_an_imported_module_registers_is_there_for_the_check(here: Path):
    with pytest.raises(ConfigError) as caught:
        make_plan("fit", command(*flags(NAMED)))
    assert {problem.key for problem in caught.value.problems} == NAMED.keys()
    name = write_module(here, "cli_registers", REGISTER)
    plan = make_plan("fit", command(*flags(NAMED), imports=[name]))
    assert plan.kernels.names()["rms_norm_implementation"] == "cli_mine"
    data = {path: name for path, name in NAMED.items() if path.startswith("data.")}
    assert make_data_view(command(*flags(data), imports=[name]))["data.transform"] == "cli_mine"


def test_it_stays_in_the_configuration_and_in_what_is_resolved_and_printed(here: Path):
    name = write_module(here, "cli_kept")
    plan = make_plan("fit", command(imports=[name]))
    assert plan.raw.written["imports"] == [name]
    assert resolved_tree(plan)["imports"] == [name]
    assert yaml.safe_load(print_config(read(command(imports=[name]))))["imports"] == [name]
    assert yaml.safe_load(print_config(read(command())))["imports"] == []


def test_a_flag_takes_several_and_an_interpolation_is_filled_in(here: Path, monkeypatch):
    names = [write_module(here, "cli_first"), write_module(here, "cli_second")]
    make_plan("fit", command("--imports", *names))
    assert list(IMPORTED) == names
    forget_imports(monkeypatch)
    monkeypatch.setenv("MINE", names[1])
    make_plan("fit", command(imports=["${oc.env:MINE}"]))
    assert list(IMPORTED) == names[1:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cli_nowhere"], "imports: 'cli_nowhere' cannot be imported: ModuleNotFoundError"),
        ("cli_nowhere", "imports: 'cli_nowhere' is not a list of texts. To fix: put it in brac"),
        ([1], "imports: 1 is not text"),
        (["${oc.env:CLI_NOWHERE}"], "imports.0: '${oc.env:CLI_NOWHERE}' cannot be resolved"),
    ],
)
def test_what_cannot_be_imported_is_one_of_the_listed_mistakes(here: Path, given, message):
    with pytest.raises(ConfigError) as caught:
        make_plan("fit", command("--train.sead", "1", imports=given))
    found = {problem.key: str(problem) for problem in caught.value.problems}
    assert len(found) == 2
    assert found.pop("train.sead")
    assert next(iter(found.values())).startswith(message)


def test_infer_imports_them_too(here: Path):
    name = write_module(here, "cli_infers")
    Path("my.yaml").write_text(yaml.safe_dump({"imports": [name], "infer": {"model_path": "."}}))
    parse_request(["--config", "my.yaml", "--prompt", "x"])
    assert list(IMPORTED) == [name]
    with pytest.raises(ConfigError, match="imports: 'cli_gone' cannot be imported"):
        parse_request(["--config", "my.yaml", "--prompt", "x", "--imports", "cli_gone"])


def test_help_shows_it(capsys):
    assert run("fit", ["--help", "imports"]) == 0
    shown = capsys.readouterr().out
    assert "--imports" in shown
    assert "--data.train_path" not in shown


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("data.chat_template", "chatm", "Did you mean 'chatml'? To fix: use one of default, pla"),
        ("data.chat_template", "no where:T", "'no where:T' is not known"),
        ("data.datasets_type", "mapings", "'mapings' is not known"),
        ("data.datasets_type", "gone:R", "'gone:R' stands for gone:R, which cannot be imported"),
        ("data.transform", "tests.helpers.own:Gone", "which cannot be imported"),
        ("data.collator", "mine", "'mine' is not known"),
    ],
)
def test_a_name_that_stands_for_nothing_is_found_before_the_run(here: Path, path, name, message):
    with pytest.raises(ConfigError) as caught:
        make_plan("fit", command(f"--{path}", name))
    (problem,) = caught.value.problems
    assert problem.key == path
    assert message in str(problem)


@pytest.mark.parametrize("name", ["gpt_oss", "mine.jinja", "tests.helpers.own:TEMPLATE"])
def test_a_template_may_be_one_of_ours_a_file_or_a_place(here: Path, name):
    Path("mine.jinja").write_text("x")
    assert make_plan("fit", command("--data.chat_template", name))
