"""Installed distributions that exist in a test's folder only, and modules of a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnilit import plugins
from omnilit.cli.registered import REGISTRIES
from omnilit.data.templates import CHAT_TEMPLATES
from omnilit.kernels import SLOTS


def forget_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing count as imported; after the test all names are as they were before it."""
    monkeypatch.setattr(plugins.IMPORTED, "_names", {})
    for registry in (*REGISTRIES, CHAT_TEMPLATES):
        monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    for slot in SLOTS.values():
        monkeypatch.setattr(slot, "_backends", dict(slot._backends))


def write_module(folder: Path, name: str, body: str = "") -> str:
    """A module in a folder; returns its name."""
    (folder / f"{name}.py").write_text(body, encoding="utf-8")
    return name


def write_distribution(folder: Path, name: str, entries: dict[str, str]) -> None:
    """What pip leaves behind of a distribution that announces plug-ins."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = [f"{entry} = {target}\n" for entry, target in entries.items()]
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{''.join(lines)}")
