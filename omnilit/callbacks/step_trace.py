"""A range of optimizer steps under torch's profiler, stopped whatever happens."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Final, Literal

import torch
from torch.profiler import profile, record_function

from omnilit.config import ProfileConfig
from omnilit.logging import get_logger

SNAPSHOT_ENTRIES: Final = 100_000  # allocations and frees that CUDA's memory history keeps
log = get_logger(__name__)


class StepTrace:
    """Records the steps [start_step, end_step), the step before as a warm-up where there is one.

    Args:
        config: `train.profile`.
        rank: Of this process, for the names of the files.
        device: Where the model is; on CUDA a snapshot of the memory is kept beside the trace.
    """

    def __init__(self, config: ProfileConfig, *, rank: int, device: torch.device) -> None:
        self.config = config
        self._rank = rank
        self._keeps_memory = config.profile_memory and device.type == "cuda"
        self._profiler = profile(
            record_shapes=config.record_shapes,
            profile_memory=config.profile_memory,
            with_stack=config.with_stack,
        )
        self._state: Literal["waiting", "warm", "recording", "over"] = "waiting"
        self._marker: record_function | None = None
        self._first = 0

    def enter(self, step: int) -> bool:
        """Say that the steps before `step` are done and that it comes next, if the run goes on.

        Returns:
            Whether files were written.
        """
        self._leave_step()
        if self._state == "recording" and step >= self.config.end_step:
            return self.stop(step - 1)
        if self._state in ("waiting", "warm") and self._has(step):
            self._begin(step)
        elif self._state == "waiting" and self._has(step + 1):
            self._profiler.prepare_trace()
            self._state = "warm"
        return False

    def mark(self, step: int) -> None:
        """Say that `step` begins: in the trace it is a bar of its own, its wait for data before."""
        if self._state == "recording" and self._marker is None:
            self._marker = record_function(f"ProfilerStep#{step}")
            self._marker.__enter__()

    def stop(self, last: int) -> bool:
        """Stop for good, and write what was recorded.

        Args:
            last: The newest step that was run, be it only in part.

        Returns:
            Whether files were written.
        """
        self._leave_step()
        state, self._state = self._state, "over"
        if state == "warm":  # torch ends a warm-up by way of a recording
            self._profiler.start_trace()
        if state in ("warm", "recording"):
            self._profiler.stop_trace()
        if state != "recording":
            return False
        self._write(last)
        return last >= self._first

    def _has(self, step: int) -> bool:
        return self.config.start_step <= step < self.config.end_step

    def _begin(self, step: int) -> None:
        if self._state == "waiting":
            self._profiler.prepare_trace()
        self._profiler.start_trace()
        if self._keeps_memory:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)  # noqa: SLF001
        self._state, self._first = "recording", step

    def _leave_step(self) -> None:
        if self._marker is not None:
            self._marker.__exit__(None, None, None)
        self._marker = None

    def _write(self, last: int) -> None:
        trace, memory = self._free_names(last)
        try:
            if last >= self._first:
                self._profiler.export_chrome_trace(str(trace))
                if self._keeps_memory:
                    torch.cuda.memory._dump_snapshot(str(memory))  # noqa: SLF001
                log.info("train.profile: steps %d to %d are in %s", self._first, last, trace)
        except OSError as error:  # a full disk costs the trace, not the run
            log.error("train.profile: %s cannot be written: %s", trace, error.strerror or error)  # noqa: TRY400
        finally:
            if self._keeps_memory:
                torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001

    def _free_names(self, last: int) -> tuple[Path, Path]:
        """Where trace and snapshot go: an earlier run's stay."""
        folder = Path(self.config.trace_dir)
        stem = f"rank{self._rank}_steps_{self._first}_to_{last}"
        names = (stem if number == 1 else f"{stem}.{number}" for number in count(1))
        pairs = ((folder / f"{name}.json.gz", folder / f"{name}.memory.pickle") for name in names)
        return next(pair for pair in pairs if not any(path.exists() for path in pair))
