"""What the pages say exists: settings, messages, commands, files and links."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from sitegen import messages
from sitegen.pages import GENERATORS, PLACE, fill

from omnilit.__main__ import TARGETS
from omnilit.cli.owners import KEPT
from omnilit.cli.plan import make_plan, read, task_fields
from omnilit.cli.raw import read_command
from omnilit.cli.tasks import TASKS, load_task
from omnilit.config.status import load_status
from omnilit.data.multisource import read_mixture
from omnilit.errors import ConfigError
from tests.helpers.guide import DOCS, Block, all_pages, read_blocks

ROOT = DOCS.parent
TRL = json.loads((ROOT / "tests" / "data" / "trl_names.json").read_text())
PAGES = all_pages()
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
LANGUAGES = {"", "json", "yaml", "python", "toml", "jinja", "text", "{literalinclude} ../configs"}
CODE = re.compile(r"`([^`\n]+)`")
# what the guide's own task adds
OWN = {"model.gamma"}


@cache
def settings() -> frozenset[str]:
    """Every setting and every group of settings."""
    paths = {entry.path for name in TASKS for entry in task_fields(load_task(name))} | OWN
    paths |= {f"trainer.{name}" for name in KEPT}
    parts = [path.split(".") for path in paths]
    groups = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    return frozenset(paths | groups | {"model.class_path", "model.init_args", "trainer.strategy"})


def read_table(page: str, heading: str = "") -> list[list[str]]:
    """The cells of every table row of a page, those under one heading."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


# Made from the source


def test_every_setting_of_the_parser_is_on_the_page_of_arguments():
    page = GENERATORS["arguments"]()
    shown = dict(re.findall(r"^`([\w.]+)`: (.+\n: .+)$", page, re.MULTILINE))
    assert sorted(shown) == sorted(load_status())
    lr = shown["train.optimizer.lr"]
    assert lr.startswith("a number, default `5e-05`\n: ")
    assert lr.endswith("*Works.*")
    assert shown["model.strict"].endswith("*Works; [added](additions.md).*")
    assert "Read by `DPOModule` only." in page.partition("## `dpo_config`")[2]


def test_the_table_of_what_is_refused_has_what_the_program_refuses():
    table = GENERATORS["refused"]()
    refused = {path for path, row in load_status().items() if row.issue is not None}
    assert set(re.findall(r"`(\w+(?:\.\w+)+)`", table)) == refused


def test_every_place_on_a_page_is_filled_and_everything_is_shown():
    places = {name for page in PAGES for name in PLACE.findall(page.read_text("utf-8"))}
    assert places == GENERATORS.keys()
    assert fill("a <!-- generated: messages.training --> b").startswith("a `the gradient norm was")
    assert all(GENERATORS[name]() for name in places)


@pytest.mark.parametrize(
    ("kind", "key", "problem", "fix"),
    [
        ("settings", "data.train_path", "no training data is given", "name a file or a folder"),
        ("data", "", "the line is not JSON (<error>)", "write one whole JSON object a line"),
        ("checkpoints", "", "the checkpoint has other shapes: <differing>", ""),
        ("training", "", "the gradient norm was not finite in <limit> steps in a row",
         "lower train.optimizer.lr, or look at the data of these steps"),
        # one call for several reasons, and several calls with one name
        ("settings", "trainer.accelerator", "'<accelerator>' is not supported", "use one of auto"),
        ("settings", "trainer.accelerator",
         "'<accelerator>' was asked for, but this machine has no CUDA device", "set trainer.acc"),
        ("settings", "", "'<backend>' cannot run here: <reasons>", "use one of"),
    ],
)  # fmt: skip
def test_messages_are_read_off_the_source(kind, key, problem, fix):
    found = [
        m for m in messages.find_messages() if (m.kind, m.key, m.problem) == (kind, key, problem)
    ]
    assert len(found) == 1
    assert found[0].fix.startswith(fix)


def test_all_errors_that_say_something_of_their_own_are_found(tmp_path):
    (tmp_path / "a.py").write_text(
        "KEY = 'a.b'\n"
        "def f(x):\n"
        "    what = 'too small' if x else 'too large'\n"
        "    raise ConfigError(key=KEY, problem=f'{x!r} is {what}', fix='change it')\n"
        "def g(found):\n"
        "    return Problem(found.key, found.problem, found.fix)\n"
    )
    assert messages.find_messages(tmp_path) == (
        messages.Message("settings", "a.b", "'<x>' is <what>", "change it"),
    )
    assert len(messages.find_messages()) > 200


# Written by hand


def test_every_message_that_troubleshooting_explains_exists():
    shown = {message.problem for message in messages.find_messages()}
    explained = [
        match[1] for row in read_table("troubleshooting.md") if (match := CODE.fullmatch(row[0]))
    ]
    assert len(explained) > 30
    assert not [text for text in explained if text not in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_exists(page: Path):
    groups = ("model", "data", "train", "dpo_config", "infer", "trainer")
    named = {text.partition(":")[0] for text in CODE.findall(page.read_text(encoding="utf-8"))}
    paths = {name for name in named if re.fullmatch(rf"({'|'.join(groups)})(\.\w+)+", name)}
    code = {"train.jsonl", "trainer.evaluate", "trainer.should_stop", "data.html"}
    assert not paths - settings() - code


@pytest.mark.parametrize("heading", ["SFTConfig", "SFTTrainer"])
def test_the_names_of_trl_are_those_of_its_release(heading: str):
    _, _, *rows = read_table("from_trl.md", heading)
    theirs = [name for row in rows for name in CODE.findall(row[0])]
    assert len(theirs) > 8
    assert not set(theirs) - set(TRL[heading])


def test_the_example_for_trl_uses_names_of_its_release():
    (script,) = [block for block in BLOCKS if block.name == "trl_script.py"]
    calls = [node for node in ast.walk(ast.parse(script.text)) if isinstance(node, ast.Call)]
    used = {ast.unparse(call.func): {k.arg for k in call.keywords} for call in calls}
    assert used["SFTConfig"] <= set(TRL["SFTConfig"])
    assert used["SFTTrainer"] <= set(TRL["SFTTrainer"])


# Blocks and links


def test_every_block_has_a_language_that_is_known():
    kinds = {block.language.removesuffix("/quickstart.yaml") for block in BLOCKS}
    assert kinds - {"{toctree}"} <= LANGUAGES


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b.name)
def test_a_block_of_yaml_is_a_configuration_without_mistakes(block: Block, tmp_path: Path):
    if "sources:" in block.text:
        (tmp_path / "mixture.yaml").write_text(block.text)
        assert read_mixture(str(tmp_path / "mixture.yaml"), key="data.train_path").sources
        return
    tree = yaml.safe_load(block.text)
    tree.pop("imports", None)  # those of the guide are run with it
    if "my_package" in str(tree.get("model")):
        tree.pop("model")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    found = read(read_command(["--config", str(tmp_path / "a.yaml")])).problems
    assert bool(found) == (block.name == "mistakes.yaml")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in {"json", "toml"}])
def test_a_block_of_data_can_be_read(block: Block):
    assert (json.loads if block.language == "json" else tomllib.loads)(block.text)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the paths that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Qwen3-0.6B").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    for block in BLOCKS:
        if block.name in {"unchanged.yaml", "mistakes.yaml", "trl.yaml", "my.yaml"}:
            (tmp_path / block.name).write_text(block.text)
    return tmp_path


@pytest.mark.parametrize("name", ["unchanged.yaml", "trl.yaml", "my.yaml"])
def test_the_examples_are_whole_configurations(example: Path, name: str):
    assert make_plan("fit", read_command(["--config", name, "--trainer.accelerator", "cpu"]))


def test_the_mistakes_are_answered_as_the_page_says(example: Path):
    with pytest.raises(ConfigError) as caught:
        make_plan(
            "fit", read_command(["--config", "mistakes.yaml", "--trainer.accelerator", "cpu"])
        )
    (shown,) = [block for block in BLOCKS if block.language == "text"]
    for line, problem in zip(shown.text.splitlines(), caught.value.problems, strict=True):
        assert str(problem).startswith(line)


def test_every_command_exists():
    targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [line for b in BLOCKS if not b.language for line in _commands(b.text)]
    assert len(lines) > 20
    for line in lines:
        words = line.split()
        if words[0] == "make":
            assert words[1] in targets, line
        if "omnilit" not in line or ".venv/bin/omnilit env" in line:
            continue
        if "omnilit" in words or any(word.endswith("/omnilit") for word in words):
            place = next(i for i, word in enumerate(words) if word.split("/")[-1] == "omnilit")
            assert words[place + 1] in TARGETS, line
        for path in re.findall(r"--([a-z_]+(?:\.\w+)+)", line):
            assert path in settings(), line


def _commands(text: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    text = page.read_text("utf-8")
    for block in read_blocks(page):
        text = text.replace(block.text, "")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", other.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_every_page_is_in_the_contents():
    index = (DOCS / "index.md").read_text("utf-8")
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages <= set(index.split())
