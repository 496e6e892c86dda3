"""Which parts of a model are gathered on their own, those that `model.basic_modules` names too."""

from __future__ import annotations

import pytest

from omnilit.errors import ConfigError
from omnilit.models.blocks import check_basic, sharding_units
from tests.helpers.models import tiny


def names_of(model, **settings):
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in sharding_units(model, **settings).modules]


def test_without_further_classes_they_are_embedding_blocks_and_head():
    layers = ["model.layers.0", "model.layers.1"]
    assert names_of(tiny("qwen3")) == ["model.embed_tokens", *layers, "lm_head"]
    assert names_of(tiny("qwen3_tied")) == layers  # shared weights stay with the root


def test_modules_inside_a_block_come_before_it_and_inner_ones_first():
    found = names_of(tiny("qwen3"), basic=["Qwen3MLP", "Linear"])
    block = [name for name in found if name.startswith("model.layers.0")]
    inside = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert block[-1] == "model.layers.0"
    assert block[-5:-1] == [f"model.layers.0.{name}" for name in (*inside, "mlp")]
    assert found[0] == "model.embed_tokens"
    assert found[-1] == "lm_head"  # a Linear that was a part already stands where it stood


def test_a_module_around_the_blocks_comes_behind_them():
    assert names_of(tiny("qwen3"), basic=["Qwen3Model"])[-1] == "model"
    model = tiny("qwen3")
    assert names_of(model, basic=[type(model).__name__]) == names_of(model)  # the root is one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen3MLPs", r"model\.basic_modules: 'Qwen3MLPs' is no class of the model\..*'Qwen3MLP'"),
        ("ModuleList", "'ModuleList' is a container that is never called"),
        ("SiLUActivation", "'SiLUActivation' holds no parameters"),
    ],
)
def test_a_class_that_cannot_be_sharded_is_refused_with_those_that_can(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_basic(tiny("qwen3"), [name])
    assert "Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3MLP" in str(caught.value)


def test_a_class_whose_weights_are_tied_to_another_module_is_refused():
    with pytest.raises(ConfigError, match="'Embedding' shares weights with another module"):
        check_basic(tiny("qwen3_tied"), ["Embedding"])
    check_basic(tiny("qwen3"), ["Embedding", "Qwen3MLP"])
