"""Who waits for whom when bytes are copied beside the computing; the device is data here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnilit.parallel import copies
from omnilit.parallel.copies import Copies, Lanes

CPU = torch.device("cpu")


class Queue:
    """A stream that only notes what it is told."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes, self.events = name, notes, 0

    def wait_stream(self, stream: Queue) -> None:
        self.notes.append(f"{self.name} waits for {stream.name}")

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        return f"{self.name} {self.events}"

    def __enter__(self) -> None:
        self.notes.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.notes.append(f"off {self.name}")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def queued(notes) -> Copies:
    out, back, current = (Queue(name, notes) for name in ("out", "back", "compute"))
    return Copies(CPU, Lanes(out, back, lambda: current))


def block(value: int) -> Tensor:
    return torch.full((64,), value, dtype=torch.uint8)


def test_a_copy_out_waits_for_what_computes_its_values_and_nobody_waits_for_it(queued, notes):
    host = queued.send(block(3))
    assert notes == ["out waits for compute", "on out", "off out"]
    assert torch.equal(host, block(3))


def test_a_copy_back_waits_for_the_memory_and_only_its_reader_waits_for_it(queued, notes):
    host = queued.send(block(3))
    del notes[:]
    values, other = queued.bring(host), queued.bring(host)
    assert notes == ["back waits for out", "back waits for compute", "on back", "off back"] * 2
    del notes[:]
    queued.await_arrival(values)
    queued.await_arrival(values)
    assert notes == ["compute waits for back 1"]
    assert torch.equal(values, block(3))
    del notes[:]
    queued.finish()  # the other one was asked for and never read
    queued.await_arrival(other)
    assert notes == ["compute waits for out 1", "compute waits for back 2"]


def test_computing_waits_once_too_much_is_on_its_way_out(queued, notes, monkeypatch):
    monkeypatch.setattr(copies, "MAX_LEAVING", 150)
    for value in range(4):
        queued.send(block(value))
    assert [note for note in notes if note.startswith("compute")] == [
        "compute waits for out 1",
        "compute waits for out 2",
    ]
    queued.finish()
    assert notes[-2:] == ["compute waits for out 3", "compute waits for out 4"]


def test_without_streams_bytes_are_copied_at_once_to_memory_of_their_own():
    plain, values = Copies.on(CPU), block(5)
    host = plain.send(values)
    values.zero_()
    back = plain.bring(host)
    host.zero_()
    plain.await_arrival(back)
    plain.finish()
    assert torch.equal(back, block(5))
