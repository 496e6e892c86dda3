"""Each rank reads its own part of the files, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from omnilit.errors import OmniError
from omnilit.models.blocks import decoder_blocks
from omnilit.models.build import build_meta
from omnilit.models.own_weights import read_own_weights
from omnilit.models.weights import gather_weights, load_weights, materialize
from omnilit.parallel.fsdp import shard_model
from omnilit.testing import run_ranks
from tests.helpers.models import tiny, tiny_config

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
OVER = {"vocab_size": 67}  # odd, so that the last rank holds less
FAMILIES = {"qwen3_tied": OVER, "gpt_oss": OVER, "qwen3_moe": {**OVER, "num_experts": 2}}


def sharded(family, mesh_shape):
    model = build_meta(tiny_config(family, **FAMILIES[family]), dtype=torch.float32)
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    shard_model(
        model,
        units=decoder_blocks(model),
        mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names),
        policy=MixedPrecisionPolicy(),
        reshard_after_forward=True,
    )
    return model


def load(folder, family, mesh_shape, *, from_rank0):
    model = sharded(family, mesh_shape)
    config = tiny_config(family, **FAMILIES[family])
    path = None if folder is None else str(Path(folder) / family)
    load_weights(model, config, path=path, seed=5, device=CPU, from_rank0=from_rank0)
    return gather_weights(model), {n: t.clone() for n, t in model.named_buffers()}


def compare_ways(folder, mesh_shape):
    for source in (folder, None):
        for family in FAMILIES:
            ways = [load(source, family, mesh_shape, from_rank0=is_on) for is_on in (True, False)]
            for sent, own in zip(*ways, strict=True):
                assert sent.keys() == own.keys()
                assert all(torch.equal(sent[name], own[name]) for name in sent), family


def count_bytes(folder, family):
    model = sharded(family, (2,))
    blueprint = build_meta(tiny_config(family, **FAMILIES[family]), dtype=torch.float32)
    materialize(model, CPU)
    read = read_own_weights(model, str(Path(folder) / family), blueprint=blueprint, strict=True)
    held = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    return read.num_bytes, held


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
            from_rank0=False,
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
