"""Plug-ins of installed packages, and modules that a configuration lists."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from omnilit.__main__ import main
from omnilit.data.batches import WorkerSettings, loader_arguments
from omnilit.data.pool import map_in_order
from omnilit.errors import ConfigError
from omnilit.plugins import IMPORTED, find_plugins, import_modules, load_plugins
from tests.helpers.plugins import forget_imports, write_distribution, write_module

COUNTING = "import os\nos.environ['COUNTED'] = os.environ.get('COUNTED', '') + 'x'\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Python finds modules and distributions."""
    forget_imports(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_plug_in_is_imported_once_at_the_start(folder, monkeypatch):
    monkeypatch.setenv("COUNTED", "")
    write_module(folder, "plug_once", COUNTING)
    write_distribution(folder, "my-plugs", {"once": "plug_once"})
    load_plugins({})
    load_plugins({})
    assert list(IMPORTED) == ["plug_once"]
    assert sys.modules["plug_once"].os.environ["COUNTED"] == "x"


def test_a_broken_plug_in_names_its_distribution_and_how_to_switch_it_off(folder):
    write_module(folder, "plug_broken", "\nraise ValueError('no luck')\n")
    write_module(folder, "plug_good")
    entries = {"broken": "plug_broken", "gone": "plug_gone.sub", "good": "plug_good"}
    write_distribution(folder, "my-plugs", entries)
    with pytest.raises(ConfigError) as caught:
        load_plugins({})
    broken, gone = map(str, caught.value.problems)
    assert broken == (
        "plug-in broken: my-plugs 1.2 announces plug_broken, which cannot be imported: ValueError: "
        f"no luck ({folder / 'plug_broken.py'}:2). To fix: mend or uninstall the package, or "
        "switch the plug-in off by OMNILIT_PLUGINS_OFF=broken."
    )
    assert "ModuleNotFoundError: No module named 'plug_gone'" in gone
    assert list(IMPORTED) == ["plug_good"]


@pytest.mark.parametrize("off", ["broken", " broken ,other", "all"])
def test_a_plug_in_that_is_switched_off_is_not_imported(folder, off):
    write_module(folder, "plug_other")
    write_distribution(folder, "my-plugs", {"broken": "plug_nowhere", "other": "plug_other"})
    environment = {"OMNILIT_PLUGINS_OFF": off}
    load_plugins(environment)
    is_on = {plugin.name: plugin.is_on for plugin in find_plugins(environment)}
    assert is_on == {"broken": False, "other": off == "broken"}


def test_switching_off_what_is_not_installed_is_an_error(folder):
    write_distribution(folder, "my-plugs", {"kernels": "plug_kernels"})
    with pytest.raises(ConfigError) as caught:
        load_plugins({"OMNILIT_PLUGINS_OFF": "kernel"})
    assert str(caught.value) == (
        "OMNILIT_PLUGINS_OFF: 'kernel' is no plug-in that is installed. Did you mean 'kernels'? "
        "To fix: take it out; installed: kernels."
    )


def test_every_verb_loads_plug_ins_and_env_lists_them(folder, capsys, monkeypatch):
    write_module(folder, "plug_shown")
    write_distribution(folder, "my-plugs", {"shown": "plug_shown", "off": "plug_off"})
    monkeypatch.setenv("OMNILIT_PLUGINS_OFF", "off")
    assert main(["env"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["off", "plug_off", "my-plugs", "1.2", "off"] in rows
    assert ["shown", "plug_shown", "my-plugs", "1.2", "on"] in rows
    assert list(IMPORTED) == ["plug_shown"]
    monkeypatch.delenv("OMNILIT_PLUGINS_OFF")
    assert main(["schema"]) == 2
    assert "my-plugs 1.2 announces plug_off" in capsys.readouterr().err


def test_listed_modules_that_cannot_be_imported_are_problems_of_the_key(folder):
    write_module(folder, "mine_wrong", "def f(:\n")
    write_module(folder, "mine_clash", (
        "from omnilit.kernels import RMS_NORM\n"
        "RMS_NORM.register('eager', 'elsewhere:eager')\n"
    ))  # fmt: skip
    problems = import_modules(["mine_nowhere", "mine_wrong", "mine_clash", "json"])
    assert [problem.key for problem in problems] == ["imports"] * 3
    nowhere, wrong, clash = (problem.problem for problem in problems)
    assert nowhere.endswith("ModuleNotFoundError: No module named 'mine_nowhere'")
    assert "'mine_wrong' cannot be imported: SyntaxError: invalid syntax" in wrong
    assert "'eager' is already registered" in clash
    assert "PYTHONPATH" in problems[0].fix
    assert list(IMPORTED) == ["json"]


def seen_in_worker(state: str, batch: int) -> tuple[bool, list[str]]:
    return state in sys.modules, list(IMPORTED)


def test_processes_that_tokenise_import_the_same_modules(folder):
    name = write_module(folder, "mine_in_workers")
    assert not import_modules([name])
    (found,) = map_in_order(seen_in_worker, name, [0], num_workers=1, preload=[__name__])
    assert found == (True, [name])


def test_data_workers_that_are_not_forked_import_them_too(folder, monkeypatch):
    name = write_module(folder, "mine_in_loaders")
    assert not import_modules([name])
    start = loader_arguments(WorkerSettings(1))["worker_init_fn"]
    forget_imports(monkeypatch)
    start(0)
    assert list(IMPORTED) == [name]
