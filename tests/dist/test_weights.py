import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3Config

from omnilit.errors import ConfigError
from omnilit.models.build import build_meta
from omnilit.models.weights import (
    gather_weights,
    initial_tensors,
    load_buffers,
    load_weights,
    pretrained_tensors,
)
from omnilit.parallel.materialize import fill
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")


def make_config():
    return Qwen3Config(
        vocab_size=67,  # odd, so that the last rank holds less
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )


def make_sharded(mesh_shape):
    model = build_meta(make_config(), dtype=torch.float32)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def load_and_gather(mesh_shape, path):
    model = make_sharded(mesh_shape)
    load_weights(model, make_config(), path=path, seed=5, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.manual_seed(0)
    logits = model.eval()(torch.arange(9)[None]).logits.detach()
    return gather_weights(model), logits


def fill_only_buffers():
    model = make_sharded((2,))
    load_buffers(model, make_config(), device=CPU)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return dict(model.named_buffers())


def read_what_is_not_there(path):
    blueprint = build_meta(make_config(), dtype=torch.float32)
    tensors = pretrained_tensors(path, blueprint=blueprint, seed=0, strict=True)
    with pytest.raises(ConfigError) as caught:
        fill(make_plain(), tensors, device=CPU)
    return str(caught.value)


def work_of_two_ranks(full, empty):
    return {
        "random": load_and_gather((2,), None),
        "folder": load_and_gather((2,), full),
        "buffers": fill_only_buffers(),
        "error": read_what_is_not_there(empty),
    }


def make_plain():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(make_config(), dtype=torch.float32)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("two_ranks")
    make_plain().save_pretrained(tmp_path / "full", max_shard_size="20KB")
    make_config().save_pretrained(tmp_path / "empty")
    folders = (str(tmp_path / "full"), str(tmp_path / "empty"))
    return run_ranks(work_of_two_ranks, 2, *folders, tmp_path=tmp_path)


def check_random(results):
    (gathered, logits), *others = results
    expected = dict(initial_tensors(build_meta(make_config(), dtype=torch.float32), seed=5))
    assert gathered.keys() == {name for name in expected if "inv_freq" not in name}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in gathered.items())
    for empty, other_logits in others:
        assert empty == {}
        assert torch.equal(other_logits, logits)


def test_random_weights_are_equal_to_the_bit_on_two_shards(two_ranks):
    check_random([result["random"] for result in two_ranks])


def test_random_weights_are_equal_to_the_bit_on_two_copies_of_two_shards(tmp_path):
    check_random(run_ranks(load_and_gather, 4, (2, 2), None, tmp_path=tmp_path))


def test_weights_of_a_folder_reach_every_rank(two_ranks):
    plain = make_plain()
    saved = plain.state_dict()
    gathered, _ = two_ranks[0]["folder"]
    assert gathered.keys() == saved.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in gathered.items())
    expected = plain.eval()(torch.arange(9)[None]).logits
    for result in two_ranks:
        torch.testing.assert_close(result["folder"][1], expected, rtol=0, atol=1e-6)


def test_files_that_rank_0_cannot_read_are_an_error_on_every_rank(two_ranks):
    first, second = (result["error"] for result in two_ranks)
    assert first == second
    assert "model.model_path: no weights can be loaded from" in first


def test_buffers_are_filled_on_every_rank_of_a_resumed_run(two_ranks):
    expected = dict(make_plain().named_buffers())
    for result in two_ranks:
        buffers = result["buffers"]
        assert buffers.keys() == expected.keys()
        assert all(torch.equal(buffer, expected[name]) for name, buffer in buffers.items())
