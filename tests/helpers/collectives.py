"""What collectives really carry, seen where torch dispatches them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

GATHER, SCATTER, SUM, EXCHANGE = "gather", "reduce-scatter", "all-reduce", "all-to-all"


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends under it, by operation and number of ranks, as in a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().removeprefix("c10d::").removeprefix("_c10d_functional::")
        if name == "_allgather_base_":
            whole, part, *_ = args
            self._add(GATHER, part, whole.numel() // part.numel(), 1.0)
        elif name == "_reduce_scatter_base_":
            part, whole, *_ = args
            self._add(SCATTER, part, whole.numel() // part.numel(), 1.0)
        elif name == "allreduce_":
            (tensor,), group, *_ = args
            size = ProcessGroup.unbox(group).size()
            self._add(SUM, tensor, size, 2 / size)
        elif name == "all_reduce":
            tensor, _, group = args
            size = _resolve_process_group(group).size()
            self._add(SUM, tensor, size, 2 / size)
        elif name == "all_gather_into_tensor":
            part, size, _ = args
            self._add(GATHER, part, size, 1.0)
        elif name == "alltoall_base_":
            _, tensor, group, *_ = args
            size = ProcessGroup.unbox(group).size()
            self._add(EXCHANGE, tensor, size, 1 / size)
        return func(*args, **(kwargs or {}))

    def _add(self, what: str, tensor: Tensor, ranks: int, share: float) -> None:
        sent = tensor.numel() * tensor.element_size() * share * (ranks - 1)
        self.sent[what, ranks] += round(sent)
