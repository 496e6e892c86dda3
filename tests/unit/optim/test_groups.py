import pytest
from torch import nn

from omnilit.errors import ConfigError
from omnilit.optim.groups import parameter_groups


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.init.ones_(nn.Parameter(nn.Linear(1, 4).weight[:, 0])))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.fc = nn.Linear(4, 4)
        self.norm = RMSNorm()
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def groups_of(model, **options):
    groups = parameter_groups(model, lr=0.5, weight_decay=0.1, **options)
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}, groups


def test_without_patterns_everything_decays_in_one_group():
    names, groups = groups_of(Tiny())
    assert names == {"backbone": {"embed.weight", "fc.weight", "fc.bias", "norm.weight"}}
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (0.5, 0.1)


def test_classes_and_names_in_any_case_do_not_decay():
    names, groups = groups_of(Tiny(), no_decay_modules=["RMSNorm"], no_decay_params=["BIAS"])
    assert names == {
        "backbone": {"embed.weight", "fc.weight"},
        "backbone/no_decay": {"norm.weight", "fc.bias"},
    }
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_a_tied_weight_is_taken_once_and_found_by_each_of_its_names():
    names, _ = groups_of(Tiny(), no_decay_params=["head"])
    assert names["backbone/no_decay"] == {"embed.weight"}
    names, _ = groups_of(Tiny(), no_decay_modules=["Embedding"])
    assert names["backbone/no_decay"] == {"embed.weight"}


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Tiny()
    model.fc.requires_grad_(False)
    names, _ = groups_of(model, no_decay_params=["fc"])
    assert names == {"backbone": {"embed.weight", "norm.weight"}}


def test_parts_get_groups_of_their_own():
    def part_of(name):
        return "tower" if name.startswith("fc") else "backbone"

    names, _ = groups_of(Tiny(), no_decay_params=["bias"], part_of=part_of)
    assert names == {
        "backbone": {"embed.weight", "norm.weight"},
        "tower": {"fc.weight"},
        "tower/no_decay": {"fc.bias"},
    }


def test_unmatched_patterns_are_refused_together_with_what_is_there():
    with pytest.raises(ConfigError) as caught:
        groups_of(Tiny(), no_decay_modules=["RMSNrm"], no_decay_params=["bais", "bias"])
    assert [p.key for p in caught.value.problems] == [
        "train.optimizer.no_decay_modules",
        "train.optimizer.no_decay_params",
    ]
    text = str(caught.value)
    assert "no module of class 'RMSNrm' holds parameters. Did you mean 'RMSNorm'?" in text
    assert "use one of Embedding, Linear, RMSNorm" in text
    assert "no parameter's name contains 'bais'. Did you mean 'bias'?" in text


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        groups_of(Tiny().requires_grad_(False))
