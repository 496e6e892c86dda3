"""transformers is kept from fla where there is no GPU."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest

from omnilit.models import gpu_packages
from omnilit.models.gpu_packages import without_fla


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of that name, which the process can import."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("")
    (tmp_path / "fla" / "ops.py").write_text("")
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("fla", "fla.ops"):
        sys.modules.pop(name, None)


def on_a_machine(monkeypatch, *absent):
    monkeypatch.setattr(gpu_packages, "why_absent", lambda kind: ["no"] if kind in absent else [])


@pytest.mark.parametrize("is_imported_before", [False, True])
def test_it_is_kept_away_for_as_long_as_asked(installed, is_imported_before, monkeypatch, caplog):
    on_a_machine(monkeypatch, "cuda", "npu")
    if is_imported_before:
        importlib.import_module("fla")
    finders = list(sys.meta_path)
    with caplog.at_level(logging.INFO, logger="omnilit"), without_fla():
        for name in ("fla", "fla.ops"):
            with pytest.raises(ModuleNotFoundError, match="kept away, since there is no GPU"):
                importlib.import_module(name)
        importlib.import_module("json.tool")
    assert sys.meta_path == finders
    assert caplog.messages == [
        "no GPU: transformers is kept from fla, whose kernels would raise here"
    ]
    assert importlib.import_module("fla.ops").__name__ == "fla.ops"


def test_where_nobody_asks_nothing_is_said(installed, monkeypatch, caplog):
    on_a_machine(monkeypatch, "cuda", "npu")
    with caplog.at_level(logging.INFO, logger="omnilit"), without_fla():
        pass
    assert not caplog.messages


@pytest.mark.parametrize("absent", ["cuda", "npu"])
def test_with_a_device_it_stays(installed, absent, monkeypatch):
    on_a_machine(monkeypatch, absent)
    with without_fla():
        assert importlib.import_module("fla").__name__ == "fla"
