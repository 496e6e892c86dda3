"""Run a function on several gloo ranks, for tests of distributed code."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ("torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor")


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: object,
    tmp_path: Path,
    timeout_s: float = 50,
) -> list[Any]:
    """Call `function(*args)` on `num_ranks` gloo ranks and return what each returned, by rank.

    Args:
        function: Importable at module level, since the ranks are fresh processes.
        num_ranks: Number of processes, one thread each.
        args: Picklable; the same for every rank.
        tmp_path: Folder for the rendezvous file, made where it is missing; pytest's fixture.
        timeout_s: Seconds after which a hanging collective or rank fails the call.

    Raises:
        AssertionError: A rank raised, died or ran out of time; holds every rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    tmp_path.mkdir(parents=True, exist_ok=True)  # where there is none, ranks wait for each other
    rendezvous = tmp_path / f"rendezvous_{os.urandom(6).hex()}"
    pipes, processes = [], []
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        body = (rank, num_ranks, str(rendezvous), timeout_s, sender, function, args)
        process = context.Process(target=_run_rank, args=body, daemon=False)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: Sequence[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=2.0 if failures else timeout_s)
        if not ready:
            missing = sorted(waiting.values())
            failures.append(f"ranks {missing} did not finish")
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                is_ok, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own ranks
            except EOFError:
                is_ok, value = False, "died without a word"
            if is_ok:
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {value}")
    if failures:
        raise AssertionError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    rank: int,
    num_ranks: int,
    rendezvous: str,
    timeout_s: float,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), OMP_NUM_THREADS="1"
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    try:
        sender.send_bytes(pickle.dumps(message))
    finally:
        sender.close()
        if message[0]:
            dist.destroy_process_group()
        else:
            os._exit(1)  # its peers may hang in a collective: do not wait for them
