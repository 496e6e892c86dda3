"""Small agreements between ranks; each is the identity in a single process."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (
    Store,
    _get_default_store,  # pyright: ignore[reportPrivateUsage]
)

from omnilit.errors import OmniError

T = TypeVar("T")
POLL_S = 0.05
READ_TIMEOUT_S = 10.0
FAILED = "failed"  # the name of the ranks with an error among summed values


def is_distributed() -> bool:
    """True where a process group stands, be it of one rank."""
    return dist.is_available() and dist.is_initialized()


def sum_over(
    values: Mapping[str, float],
    group: ProcessGroup | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Sum each value over the ranks of `group`, in float64, with one all-reduce.

    Args:
        values: The same keys in the same order on every rank.
        group: Default: all ranks.
        device: Where the backend of the group works: "cpu" for gloo.
    """
    return _reduce(values, dist.ReduceOp.SUM, group, device)


def max_over(
    values: Mapping[str, float],
    group: ProcessGroup | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """The largest of each value over the ranks of `group`; see `sum_over`."""
    return _reduce(values, dist.ReduceOp.MAX, group, device)


def _reduce(
    values: Mapping[str, float],
    operation: dist.ReduceOp.RedOpType,
    group: ProcessGroup | None,
    device: str | torch.device,
) -> dict[str, float]:
    if not is_distributed() or dist.get_world_size(group) == 1:
        return {name: float(value) for name, value in values.items()}
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed, op=operation, group=group)
    return dict(zip(values, packed.tolist(), strict=True))


def sum_or_raise(
    values: Mapping[str, float],
    error: BaseException | None = None,
    group: ProcessGroup | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """`sum_over`, or `raise_together` where any rank gives an error: still one all-reduce.

    Args:
        values: The same keys in the same order on every rank, with an error too.
        error: Why this rank has no values.
        group: Default: all ranks.
        device: Where the backend of the group works: "cpu" for gloo.

    Raises:
        OmniError: See `raise_together`.
    """
    sums = sum_over({**values, FAILED: float(error is not None)}, group, device)
    if sums.pop(FAILED):
        raise_together(error, group)
    return sums


def share_from(rank: int, value: T, group: ProcessGroup, device: str | torch.device = "cpu") -> T:
    """What one rank of `group` has, on every rank of it.

    Args:
        rank: Which one, counted in the group.
        value: Anything that pickles; what the other ranks give is not used.
        group: The ranks that call.
        device: Where the backend of the group works: "cpu" for gloo.
    """
    box = [value]
    dist.broadcast_object_list(box, group_src=rank, group=group, device=torch.device(device))
    return box[0]


def gather_objects(value: T, group: ProcessGroup | None = None) -> list[T]:
    """What each rank of `group` has, by rank, on all of them.

    Args:
        value: Anything that pickles.
        group: The ranks that call; default: all.
    """
    gathered = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def raise_together(error: BaseException | None, group: ProcessGroup | None = None) -> None:
    """Raise on every rank when any rank has an error; every rank must call.

    A rank that raises alone leaves the others hanging in their next collective.

    Args:
        error: This rank's.
        group: The ranks that call; default: all.

    Raises:
        OmniError: The own error, or the first other rank's one. Anything else that a rank
            raised is raised there as it is and named elsewhere by an OmniError.
    """
    if not is_distributed() or dist.get_world_size(group) == 1:
        if error is not None:
            raise error
        return
    ranks = dist.get_process_group_ranks(group)
    gathered = gather_objects(None if error is None else _pack(error), group)
    if error is not None:
        raise error
    for rank, packed in zip(ranks, gathered, strict=True):
        if packed is not None:
            raise _unpack(packed, rank)


def run_on_first(function: Callable[[], T], *, name: str, timeout_s: float = 24 * 3600.0) -> T:
    """Run `function` on rank 0 only and hand its result, or its error, to every rank.

    No collective is held open while rank 0 works, so its work may outlast the timeout of the
    process group: the others watch the rendezvous store. Every rank must make the calls of one
    name in the same order; the n-th call of each belongs together.

    Args:
        function: Returns something that JSON can hold.
        name: What is done, for the store's key.
        timeout_s: How long the others wait.

    Raises:
        OmniError: On every rank, when `function` raised one.
        TimeoutError: Rank 0 did not finish in time.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return function()
    store, rank = _get_default_store(), dist.get_rank()
    call = store.add(f"omnilit/{name}/calls/{rank}", 1)
    key = f"omnilit/{name}/{call}"
    if rank != 0:
        return cast("T", _await_result(store, key, timeout_s))
    try:
        result = function()
    except BaseException as error:
        store.set(key, "E" + _pack(error).hex())
        _await_readers(store, key)
        raise
    store.set(key, "R" + json.dumps(result))
    return result


def _await_readers(store: Store, key: str) -> None:
    """Let the others read an error first: the store is gone once this process has ended."""
    num_others, end = dist.get_world_size() - 1, time.monotonic() + READ_TIMEOUT_S
    while store.add(f"{key}/read", 0) < num_others and time.monotonic() < end:
        time.sleep(POLL_S)


def _await_result(store: Store, key: str, timeout_s: float) -> object:
    end = time.monotonic() + timeout_s
    while not store.check([key]):
        if time.monotonic() > end:
            raise TimeoutError(f"rank 0 did not finish {key} within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    answer = store.get(key).decode()
    store.add(f"{key}/read", 1)
    if answer.startswith("E"):
        raise _unpack(bytes.fromhex(answer[1:]), 0)
    return json.loads(answer[1:])


def _pack(error: BaseException) -> bytes:
    """An error as bytes; only our own types cross as themselves."""
    if isinstance(error, OmniError):
        return pickle.dumps(error)
    return pickle.dumps(OmniError(f"{type(error).__name__}: {error}"))


def _unpack(packed: bytes, rank: int) -> OmniError:
    error = pickle.loads(packed)  # noqa: S301 - from a rank of this very run, over its own group
    if type(error) is OmniError:
        return OmniError(f"rank {rank} failed: {error}")
    return cast("OmniError", error)
