"""Each rank reads its own part of the files, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnilit.errors import OmniError
from omnilit.models.blocks import decoder_blocks
from omnilit.models.build import build_meta
from omnilit.models.stored_weights import read_own_weights
from omnilit.models.weights import Delivery, gather_weights, load_weights, materialize
from omnilit.parallel.fsdp import shard_model
from omnilit.parallel.local import local_part
from omnilit.parallel.materialize import fill
from omnilit.testing import run_ranks
from tests.helpers.models import tiny, tiny_config
from tests.helpers.spread import spread, topology_of

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
OVER = {"vocab_size": 67}  # odd, so that the last rank holds less
FAMILIES = {
    "qwen3_tied": OVER,
    "gpt_oss": OVER,
    "qwen3_moe": {**OVER, "num_experts": 2},
}
EXPERT = 64 * 64 * 4  # bytes of the fused gate and up projection of one
CHUNK = EXPERT // 4
AXES = {
    "experts": {"ep_size": 2},
    "matrices": {"tp_size": 2},
    "both": {"ep_size": 2, "tp_size": 2},
}


def config_of(family):
    if family == "experts":
        return tiny_config("qwen3_moe", vocab_size=68)
    return tiny_config(family, **FAMILIES[family])


def sharded(family, mesh_shape):
    model = build_meta(config_of(family), dtype=torch.float32)
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    shard_model(
        model,
        units=decoder_blocks(model),
        mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names),
        policy=MixedPrecisionPolicy(),
        reshard_after_forward=True,
    )
    return model


def load(folder, family, model, *, delivery):
    path = None if folder is None else str(Path(folder) / family)
    load_weights(model, config_of(family), path=path, seed=5, device=CPU, delivery=delivery)


def load_and_gather(folder, family, mesh_shape, *, delivery):
    model = sharded(family, mesh_shape)
    load(folder, family, model, delivery=delivery)
    return gather_weights(model), {n: t.clone() for n, t in model.named_buffers()}


WAYS = (Delivery(), Delivery(from_rank0=False), Delivery(max_bytes=6000))


def compare_ways(folder, mesh_shape):
    for source in (folder, None):
        for family in FAMILIES:
            first, *others = [
                load_and_gather(source, family, mesh_shape, delivery=way) for way in WAYS
            ]
            for other in others:
                for sent, own in zip(first, other, strict=True):
                    assert sent.keys() == own.keys()
                    assert all(torch.equal(sent[name], own[name]) for name in sent), family


def count_bytes(folder, family):
    model = sharded(family, (2,))
    blueprint = build_meta(config_of(family), dtype=torch.float32)
    materialize(model, CPU)
    read = read_own_weights(model, str(Path(folder) / family), blueprint=blueprint, strict=True)
    held = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    return read.num_bytes, held


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made in here took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(local, torch.Tensor) and not local.is_meta:
                storage = local.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(n for ref, n in self._made.values() if not ref.expired()))
        return made


def measure_peaks(folder):
    """Most bytes beside a rank's own parameters and buffers, for each source and size of chunk."""
    found = {}
    for source in (folder, None):
        for max_bytes in (CHUNK, None):
            model, delivery = sharded("experts", (2,)), Delivery(max_bytes=max_bytes)
            with LiveBytes() as live:
                load(source, "experts", model, delivery=delivery)
            locals_ = [t.to_local() for t in model.parameters() if isinstance(t, DTensor)]
            own = sum(t.nbytes for t in (*locals_, *model.buffers()))
            found[source is None, max_bytes] = live.peak - own
    return found


def peaks_of_axes(folder):
    """The same under axes that cut a model in other ways, sent in chunks."""
    found = {}
    for name, sizes in AXES.items():
        model = build_meta(config_of("experts"), dtype=torch.float32)
        spread(model, topology_of(**sizes))
        with LiveBytes() as live:
            load(folder, "experts", model, delivery=Delivery(max_bytes=CHUNK))
        own = sum(local_part(t).nbytes for t in (*model.parameters(), *model.buffers()))
        found[name] = live.peak - own
    return found


class Torn:
    """Values of which the second half cannot be read."""

    shape = torch.Size((4, 2))

    def __getitem__(self, box):
        if box[0].start:
            raise OmniError("the disk is gone")
        return torch.ones(self.shape)[box]


def receive_torn():
    layer = nn.Linear(2, 4, bias=False)
    with pytest.raises(OmniError, match="the disk is gone"):
        fill(layer, [("weight", Torn())], device=CPU, max_bytes=16)
    return layer.weight.detach().tolist()


def measure_and_tear(folder):
    return measure_peaks(folder), receive_torn(), peaks_of_axes(folder)


def test_no_rank_but_the_first_needs_more_than_its_part_and_one_chunk(tmp_path):
    tiny("qwen3_moe", vocab_size=68).save_pretrained(tmp_path / "experts")
    first, second = run_ranks(measure_and_tear, 2, str(tmp_path), tmp_path=tmp_path)
    small = 512  # bytes: what says whose piece comes next, and the weight of a norm
    for is_drawn in (True, False):
        assert second[0][is_drawn, CHUNK] <= CHUNK + small
        assert second[0][is_drawn, None] >= 8 * EXPERT  # whole, all experts of a layer
    # rank 0 reads one expert's two tensors, stacks and joins them, and sends of that chunk by chunk
    assert first[0][False, CHUNK] <= 4 * EXPERT + 2 * CHUNK + small
    # where a rank's rows are not of one piece, their positions are listed on the way
    assert all(peak <= CHUNK + 2 * small for peak in second[2].values()), second[2]
    for received in (first[1], second[1]):
        assert received[:2] == [[1, 1]] * 2  # the piece before the error
        assert received[2:] != [[1, 1]] * 2


def work_of_two_ranks(folder):
    compare_ways(folder, (2,))
    read = {family: count_bytes(folder, family) for family in FAMILIES}
    (Path(folder) / "torn").mkdir(exist_ok=True)
    with pytest.raises(OmniError) as caught:
        load_weights(
            sharded("gpt_oss", (2,)),
            tiny_config("gpt_oss"),
            path=str(Path(folder) / "torn"),
            seed=5,
            device=CPU,
            delivery=Delivery(from_rank0=False),
        )
    return read, str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for family, over in FAMILIES.items():
        tiny(family, **over).save_pretrained(folder / family, max_shard_size="60KB")
    return folder


def test_two_ranks_read_what_they_hold_and_get_what_rank_0_would_have_sent(folder, tmp_path):
    results = run_ranks(work_of_two_ranks, 2, str(folder), tmp_path=tmp_path)
    for read, message in results:
        assert message.startswith("model.model_path: no weights can be loaded from")
        for family, (num_bytes, held) in read.items():
            assert num_bytes == held, family


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)])
def test_ranks_without_an_expert_and_copies_of_shards_read_right(folder, mesh_shape, tmp_path):
    num_ranks = torch.tensor(mesh_shape).prod().item()
    run_ranks(compare_ways, int(num_ranks), str(folder), mesh_shape, tmp_path=tmp_path)
