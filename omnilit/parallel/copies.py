"""Bytes between a device and host memory, on streams of their own so that computing goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor

MAX_LEAVING: Final = 2**28  # bytes that may wait for their copy before computing waits too


class Stream(Protocol):
    """What is needed of a queue of work on a device; `torch.Stream` is one."""

    def wait_stream(self, stream: Any, /) -> None:
        """Let later work here wait for all that was queued there."""
        ...

    def wait_event(self, event: Any, /) -> None:
        """Let later work here wait for one moment of another stream."""
        ...

    def record_event(self) -> Any:
        """The moment at which all work queued so far is done."""
        ...

    def __enter__(self) -> Any:
        """Queue what follows here."""
        ...

    def __exit__(self, kind: object, error: object, trace: object, /) -> Any:
        """Queue what follows where it was queued before."""
        ...


@dataclass(frozen=True, slots=True)
class Lanes:
    """The queues of a device with streams.

    Args:
        out: To host memory.
        back: From host memory.
        current: The one that computes at the moment.
    """

    out: Stream
    back: Stream
    current: Callable[[], Stream]


@dataclass(slots=True)
class Copies:
    """Sends bytes to host memory and brings them back.

    Memory of the device is given back only behind a wait of the computing stream for the copy, so
    that its allocator needs to know of no other stream.

    Args:
        device: Where the bytes come from.
        lanes: Queues for the copies; None copies at once.
    """

    device: torch.device
    lanes: Lanes | None = None
    _leaving: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    _arriving: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device) -> Copies:
        """Those of a device; on a CPU they go to another buffer of the same memory, at once."""
        if device.type == "cpu":
            return cls(device)
        out, back = torch.Stream(device), torch.Stream(device)
        return cls(device, Lanes(out, back, lambda: torch.accelerator.current_stream(device)))

    def send(self, values: Tensor) -> Tensor:
        """Copy bytes to host memory.

        Args:
            values: Written by what is queued already; the caller gives them up.

        Returns:
            The copy, pinned where the device is no CPU; for `bring` only, as it may be on its way.
        """
        is_pinned = self.device.type != "cpu"  # else the copy would not overlap with anything
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=is_pinned)
        if self.lanes is None:
            return host.copy_(values)
        out = self.lanes.out
        out.wait_stream(self.lanes.current())
        with out:
            host.copy_(values, non_blocking=True)
        self._leaving.append((out.record_event(), values))
        while sum(waiting.nbytes for _, waiting in self._leaving) > MAX_LEAVING:
            self._let_go()
        return host

    def bring(self, host: Tensor) -> Tensor:
        """Start to copy bytes back.

        Args:
            host: From `send`.

        Returns:
            Memory on the device, to be read behind `await_arrival`.
        """
        values = torch.empty_like(host, device=self.device, pin_memory=False)
        if self.lanes is None:
            return values.copy_(host)
        back = self.lanes.back
        back.wait_stream(self.lanes.out)
        back.wait_stream(self.lanes.current())  # which may yet read what stood here before
        with back:
            values.copy_(host, non_blocking=True)
        self._arriving[id(values)] = (back.record_event(), values)
        return values

    def await_arrival(self, values: Tensor) -> None:
        """Let what is computed next wait for bytes from `bring`; nothing where they are there."""
        event, _ = self._arriving.pop(id(values), (None, None))
        if event is not None and self.lanes is not None:
            self.lanes.current().wait_event(event)

    def finish(self) -> None:
        """Let what is computed next wait for all copies, of bytes that nobody asked for too."""
        while self._leaving:
            self._let_go()
        for _, values in list(self._arriving.values()):
            self.await_arrival(values)

    def _let_go(self) -> None:
        event, _ = self._leaving.popleft()
        assert self.lanes is not None
        self.lanes.current().wait_event(event)
