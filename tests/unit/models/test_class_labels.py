"""Which configuration is a classifier's, what its classes are, and what it starts from."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnilit.config.class_rules import class_problems
from omnilit.errors import ConfigError
from omnilit.models.build import build_meta
from omnilit.models.class_labels import (
    as_classifier,
    class_names,
    is_classifier,
    refuse_classifier,
)
from omnilit.models.weights import Delivery, initial_tensors, load_weights
from omnilit.parallel.materialize import named_tensors
from tests.helpers.models import tiny, tiny_config

CPU = torch.device("cpu")


def test_a_language_model_becomes_a_classifier_whose_names_stand_in_its_configuration():
    config = tiny_config("qwen3")
    own = as_classifier(config, label_names=["no", "yes"])
    assert is_classifier(own)
    assert not is_classifier(config)
    assert own.architectures == ["Qwen3ForSequenceClassification"]
    assert (own.num_labels, own.id2label) == (2, {0: "no", 1: "yes"})
    assert own.label2id == {"no": 0, "yes": 1}
    assert class_names(own) == ("no", "yes")
    assert class_names(config) is None
    assert type(build_meta(own, dtype=torch.float32)).__name__ == "Qwen3ForSequenceClassification"


def test_a_number_alone_gives_the_names_of_transformers():
    assert class_names(as_classifier(tiny_config("llama"), num_labels=3)) == (
        *("LABEL_0", "LABEL_1", "LABEL_2"),
    )


def test_a_classifier_keeps_its_classes_where_none_are_given():
    own = as_classifier(tiny_config("qwen3"), label_names=["a", "b", "c"])
    assert class_names(as_classifier(own)) == ("a", "b", "c")
    assert class_names(as_classifier(own, num_labels=3)) == ("a", "b", "c")
    assert class_names(as_classifier(own, label_names=["x", "y", "z"])) == ("x", "y", "z")
    assert class_names(as_classifier(own, num_labels=2)) == ("LABEL_0", "LABEL_1")


def test_classes_must_be_known_and_the_model_one_that_classifies():
    with pytest.raises(ConfigError, match="neither num_labels nor label_names is given"):
        as_classifier(tiny_config("qwen3"))
    with pytest.raises(ConfigError, match="no ForSequenceClassification for cohere"):
        as_classifier(tiny_config("cohere"), num_labels=2)
    with pytest.raises(ConfigError, match="is a classifier and writes no text"):
        refuse_classifier(as_classifier(tiny_config("qwen3"), num_labels=2))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ((1, None), "model.num_labels: 1 leaves nothing to tell apart."),
        ((None, ["a"]), "model.label_names: 1 names leave nothing to tell apart."),
        ((None, ["a", " "]), "model.label_names: a name is empty."),
        ((None, ["a", "b", "a"]), "model.label_names: 'a' stands there twice."),
        ((3, ["a", "b"]), "model.num_labels: 3 classes, but label_names has 2."),
    ],
)
def test_unclear_classes_are_refused(given, problem):
    (found,) = class_problems(*given)
    assert str(found).startswith(problem)
    with pytest.raises(ConfigError, match="To fix"):
        as_classifier(tiny_config("qwen3"), num_labels=given[0], label_names=given[1])


@pytest.mark.parametrize("given", [(2, None), (None, ["a", "b"]), (2, ["a", "b"]), (None, None)])
def test_clear_classes_are_not(given):
    assert not class_problems(*given)


def load(folder, family="qwen3", *, from_rank0=True, strict=True, num_labels=3):
    config = as_classifier(tiny_config(family), num_labels=num_labels)
    model = build_meta(config, dtype=torch.float32)
    delivery = Delivery(from_rank0=from_rank0)
    load_weights(
        model, config, path=str(folder), seed=5, device=CPU, strict=strict, delivery=delivery
    )
    return model, config


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "phi"])
@pytest.mark.parametrize("from_rank0", [True, False])
def test_a_language_model_lends_its_body_and_the_head_is_drawn(
    family, from_rank0, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    before = tiny(family)
    before.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model, config = load(tmp_path, family, from_rank0=from_rank0)
    found, body = named_tensors(model), named_tensors(before)
    drawn = dict(initial_tensors(build_meta(config, dtype=torch.float32), seed=5))
    own = {name for name in found if name.startswith("score.")}
    assert all(torch.equal(found[name], drawn[name]) for name in own)
    assert all(torch.equal(found[name], body[name]) for name in found.keys() - own)
    said = caplog.text
    assert "the head of the classes is new and starts at random: score.weight" in said
    unused = [name for name in body if name.startswith("lm_head.")]
    assert all(name in said for name in unused)


def test_what_else_differs_is_refused_as_ever(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["stray.weight"] = torch.zeros(1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "lack model.norm.weight" in text
    assert "stray.weight" in text
    assert "lm_head" not in text
    assert "score" not in text


def test_a_classifier_of_other_classes_is_refused(tmp_path):
    model, _ = load(_saved(tmp_path))
    model.save_pretrained(tmp_path / "classes")
    again, _ = load(tmp_path / "classes")
    assert torch.equal(again.get_parameter("score.weight"), model.get_parameter("score.weight"))
    with pytest.raises(ConfigError, match=r"score.weight \[3, 64\] instead of \[4, 64\]"):
        load(tmp_path / "classes", num_labels=4)


def _saved(folder):
    tiny("qwen3").save_pretrained(folder / "language")
    return folder / "language"
