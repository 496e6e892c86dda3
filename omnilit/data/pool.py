"""A function over many batches in worker processes, the results in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from omnilit.errors import DataError
from omnilit.plugins import IMPORTED, import_again

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
AHEAD: Final = 2  # batches that wait for each worker
# Each worker is a thread of the whole already
SINGLE_THREADED: Final = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def count_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[S, T], R],
    state: S,
    batches: Iterable[T],
    *,
    num_workers: int,
    preload: Sequence[str],
) -> Iterator[R]:
    """`function(state, batch)` of each batch, in order.

    Only a few batches are under way at a time, so memory does not grow with their number.

    Args:
        function: Importable at module level.
        state: Sent to each worker once.
        batches: Read in this process, as they are needed.
        num_workers: 0 runs everything here.
        preload: Modules that workers need, imported once for all of them.

    Raises:
        DataError: A worker died. What the function raises is raised here.
    """
    if not num_workers:
        yield from (function(state, batch) for batch in batches)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "state.pickle"
        held.write_bytes(pickle.dumps(state))
        call = partial(_call, str(held), function)
        imports = (tuple(IMPORTED),)
        with ProcessPoolExecutor(num_workers, context, _start_worker, imports) as executor:
            try:
                yield from _run(executor, call, iter(batches), AHEAD * num_workers)
            except BrokenProcessPool as error:
                raise DataError(
                    problem="a process that tokenises died",
                    fix="look for a lack of memory in the system's log",
                ) from error
            finally:
                executor.shutdown(wait=True, cancel_futures=True)


def _run(
    executor: ProcessPoolExecutor, call: Callable[[T], R], batches: Iterator[T], num_ahead: int
) -> Iterator[R]:
    under_way: deque[Future[R]] = deque()
    for batch in islice(batches, num_ahead):
        under_way.append(executor.submit(call, batch))
    while under_way:
        result = under_way.popleft().result()
        for batch in islice(batches, 1):
            under_way.append(executor.submit(call, batch))
        yield result


def _start_worker(imports: tuple[str, ...]) -> None:
    os.environ.update(SINGLE_THREADED)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import_again(imports)  # before what was pickled is read


def _end_with_parent() -> None:
    """A parent that is killed tells its workers nothing, and each would hold the others' pipes."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has been started by somebody"
    parent.join()
    os._exit(1)


def _call(held: str, function: Callable[[Any, T], R], batch: T) -> R:
    return function(_load(held), batch)


@cache
def _load(held: str) -> Any:
    """The state, read once in each worker."""
    return pickle.loads(Path(held).read_bytes())  # noqa: S301 - written by our own parent
