"""Memory in use is that of the worst moment since the last line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from omnilit.callbacks import peak_memory
from omnilit.callbacks.peak_memory import PeakMemory

CPU = torch.device("cpu")


def touch(mib: int) -> None:
    """Use so much memory for a moment."""
    bytearray(mib * 2**20)


def test_on_a_cpu_the_peak_between_two_lines_is_seen_and_then_forgotten():
    memory = PeakMemory(CPU)
    memory.reset()
    before = memory.read_gib()
    touch(256)
    assert memory.read_gib() - before == pytest.approx(0.25, abs=0.02)
    memory.reset()
    assert memory.read_gib() - before < 0.05


def test_where_the_peak_cannot_be_reset_what_is_resident_now_stands_in(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    memory = PeakMemory(CPU)
    memory.reset()
    before = memory.read_gib()
    kept = bytearray(256 * 2**20)
    assert memory.read_gib() - before == pytest.approx(0.25, abs=0.02)
    del kept
    assert memory.read_gib() - before < 0.05


def test_on_a_device_it_is_the_allocators_peak(monkeypatch):
    state = {"peak": 3 * 2**30}
    module = SimpleNamespace(
        max_memory_allocated=lambda _: state["peak"],
        reset_peak_memory_stats=lambda _: state.update(peak=2**30),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    memory = PeakMemory(torch.device("cuda", 0))
    assert memory.read_gib() == 3
    memory.reset()
    assert memory.read_gib() == 1
