"""Activations moved to host memory between the forward and the backward pass.

What autograd saves is seen through its hooks. What is moved is memory, not tensors: views of one
block of it, such as the parts of a fused projection, travel once and come back with their layout.

Known from torch's `save_on_cpu`, torchtune's and TRL's `OffloadActivations` (copies on streams of
their own, small tensors stay) and from ZeRO-Infinity, arXiv 2104.07857.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from omnilit.errors import TrainingError
from omnilit.logging import get_logger
from omnilit.parallel.copies import Copies
from omnilit.parallel.fsdp import fsdp_modules
from omnilit.parallel.local import local_part

MIN_BYTES: Final = 1024  # below it a copy costs more than the memory is worth
MIB: Final = 2**20
log = get_logger(__name__)


class Budget:
    """Which of the saved blocks stay on the device: the newest ones, up to a limit.

    Backward needs the newest first, and while it works with them older ones come back.

    Args:
        limit: Bytes that may stay.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def add(self, number: int, size: int) -> list[int]:
        """Count a new block of `size` bytes.

        Returns:
            The numbers of the blocks that must leave for it, oldest first; perhaps its own.
        """
        self._sizes[number] = size
        self.kept += size
        leaving: list[int] = []
        while self.kept > self.limit:
            leaving.append(next(iter(self._sizes)))
            self.remove(leaving[-1])
        return leaving

    def remove(self, number: int) -> None:
        """Forget a block that is gone; nothing where it has left before."""
        self.kept -= self._sizes.pop(number, 0)


@dataclass(slots=True, weakref_slot=True, eq=False)
class Block:
    """One block of memory that backward will read.

    Args:
        unit: Number of the unit whose forward saved it first.
        source: One of the tensors that were saved; only its version is of interest.
        version: Its count of writes in place when it was saved.
        values: The bytes on the device, while they are there.
        host: The bytes in host memory, while they are only there.
    """

    unit: int
    source: Tensor | None
    version: int
    values: Tensor | None
    host: Tensor | None = None

    def check(self) -> None:
        """Refuse memory that was written to after it was saved, as autograd does without hooks.

        Raises:
            TrainingError: It was.
        """
        if self.source is not None and _version(self.source) != self.version:
            raise TrainingError(
                problem="what backward reads was changed in place after it was saved",
                fix="correct the model's code: without enable_activation it fails too",
            )


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved tensor as a view of a block."""

    block: Block
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class ActivationOffload:
    """Moves what autograd saves in `saving` to host memory, and brings it back in backward.

    Memory of parameters stays, and so do small blocks and those of another device. When backward
    asks for the first block of a unit, the unit's others and those of the unit before are sent on
    their way too: they arrive while this one computes.

    Args:
        copies: How bytes get from one memory to the other.
        limit: Bytes that may stay on the device.

    Attributes:
        saved_bytes: Of all blocks so far, each counted once.
        moved_bytes: Of those that went to host memory.
    """

    def __init__(self, copies: Copies, *, limit: int) -> None:
        self.saved_bytes = self.moved_bytes = 0
        self._copies = copies
        self._budget = Budget(limit)
        self._unit = self._number = 0
        self._reached: set[int] = set()
        self._parameters: dict[int, StorageWeakRef] = {}
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[Block]]] = {}
        self._by_number: dict[int, weakref.ref[Block]] = {}
        self._by_unit: defaultdict[int, list[weakref.ref[Block]]] = defaultdict(list)
        self._is_reported = False

    @classmethod
    def of(cls, model: nn.Module, *, limit: int, device: torch.device) -> ActivationOffload:
        """The one of a sharded model.

        Args:
            model: After `shard_model`.
            limit: Bytes that may stay on the device.
            device: This rank's own.
        """
        offload = cls(Copies.on(device), limit=limit)
        offload.watch([unit for unit in fsdp_modules(model) if isinstance(unit, nn.Module)])
        return offload

    def watch(self, units: Collection[nn.Module]) -> None:
        """Learn when a unit begins, and which memory its parameters have then.

        Args:
            units: Modules that run one after the other, or within one another.
        """
        known = set(units)
        for unit in units:
            own = list(_own_modules(unit, known))
            unit.register_forward_pre_hook(partial(self._begin_unit, own))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Move what is saved in here; backward comes behind it."""
        self._forget()
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def report(self) -> None:
        """Say after the first step how much was moved; later calls do nothing."""
        if self._is_reported:
            return
        self._is_reported = True
        moved, saved = self.moved_bytes / MIB, self.saved_bytes / MIB
        log.info("activations: %.1f of %.1f MiB of a step went to host memory", moved, saved)

    def _begin_unit(self, own: Collection[nn.Module], *_: object) -> None:
        """FSDP2 has gathered a unit: its parameters are where its forward will read them."""
        self._unit += 1
        with torch.no_grad():
            for module in own:
                for parameter in module.parameters(recurse=False):
                    storage = local_part(parameter).untyped_storage()
                    self._parameters[_address(storage)] = StorageWeakRef(storage)

    def _pack(self, tensor: Tensor) -> Tensor | Saved:
        if type(tensor) is not Tensor:  # a parameter; or a wrapper, whose memory is another's
            return tensor
        storage = tensor.untyped_storage()
        is_elsewhere = storage.device.type != self._copies.device.type
        if is_elsewhere or storage.nbytes() < MIN_BYTES or self._is_parameter(storage):
            return tensor
        block = self._block_of(tensor, storage)
        offset = int(tensor.storage_offset())
        return Saved(block, tensor.dtype, offset, tensor.shape, tensor.stride())

    def _unpack(self, saved: Tensor | Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        block = saved.block
        block.check()
        self._fetch(block)
        self._fetch_ahead(block.unit)
        assert block.values is not None
        self._copies.await_arrival(block.values)
        view = torch.empty(0, dtype=saved.dtype, device=block.values.device)
        storage = block.values.untyped_storage()
        return view.set_(storage, saved.offset, saved.shape, saved.stride)

    def _is_parameter(self, storage: torch.UntypedStorage) -> bool:
        found = self._parameters.get(_address(storage))
        return found is not None and not found.expired()

    def _block_of(self, tensor: Tensor, storage: torch.UntypedStorage) -> Block:
        """The block that is this memory, a new one where it is saved for the first time."""
        address = _address(storage)  # no other's, as long as a weak reference to it is held
        version = _version(tensor)
        if address in self._known:
            reference, known = self._known[address]
            block = known()
            if block is not None and not reference.expired() and block.version == version:
                return block
        values = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        block = Block(self._unit, tensor.detach(), version, values)
        self._known[address] = (StorageWeakRef(storage), weakref.ref(block))
        self._by_unit[block.unit].append(weakref.ref(block))
        self.saved_bytes += values.nbytes
        self._keep(block, values.nbytes)
        return block

    def _keep(self, block: Block, size: int) -> None:
        """Count a new block, and send away what there is no room for any more."""
        self._number += 1
        self._by_number[self._number] = weakref.ref(block)
        weakref.finalize(block, self._drop, self._number).atexit = False
        for number in self._budget.add(self._number, size):
            leaving = self._by_number[number]()
            if leaving is None or leaving.values is None:
                continue
            leaving.check()
            self.moved_bytes += leaving.values.nbytes
            leaving.host = self._copies.send(leaving.values)
            leaving.values = leaving.source = None

    def _drop(self, number: int) -> None:
        self._budget.remove(number)
        self._by_number.pop(number, None)

    def _fetch(self, block: Block) -> None:
        if block.values is None:
            assert block.host is not None
            block.values = self._copies.bring(block.host)
            block.host = None

    def _fetch_ahead(self, unit: int) -> None:
        """Start what backward needs next: the rest of this unit, and the unit before it."""
        if unit in self._reached:
            return
        self._reached.add(unit)
        before = max((other for other in self._by_unit if other < unit), default=unit)
        for number in (unit, before):
            for reference in reversed(self._by_unit.pop(number, [])):
                if (block := reference()) is not None:
                    self._fetch(block)

    def _forget(self) -> None:
        """Drop what is known of memory that is gone."""
        self._copies.finish()
        self._reached.clear()
        self._known = {key: pair for key, pair in self._known.items() if pair[1]() is not None}
        for unit, blocks in list(self._by_unit.items()):
            if not any(block() is not None for block in blocks):
                del self._by_unit[unit]


def _own_modules(unit: nn.Module, units: Collection[nn.Module]) -> Iterator[nn.Module]:
    """A unit's modules without those of other units in it."""
    yield unit
    for child in unit.children():
        if child not in units:
            yield from _own_modules(child, units)


def _address(storage: torch.UntypedStorage) -> int:
    """What tells storages apart; unlike a pointer to their bytes it outlives a freed one."""
    return storage._cdata  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as StorageWeakRef does


def _version(tensor: Tensor) -> int:
    """How often the tensor was written in place."""
    return tensor._version  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
