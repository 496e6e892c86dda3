"""The head of a model: what makes logits of hidden states."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from omnilit.logging import get_logger
from omnilit.models.class_labels import is_classifier
from omnilit.models.weight_report import KEY, listed

log = get_logger(__name__)


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The head of a language model or a classifier; None where it has none.

    Args:
        model: Whole or a stage of it; on any device.
    """
    if not is_classifier(model.config):
        return model.get_output_embeddings()
    name = class_head_name(model)
    return None if name is None else model.get_submodule(name)


def class_head_name(model: PreTrainedModel) -> str | None:
    """The name of a classifier's head: the one linear layer of as many outputs beside its body."""
    found = [
        name
        for name, child in model.named_children()
        if child is not model.base_model
        and type(child) is nn.Linear
        and child.out_features == model.config.num_labels
    ]
    return found[0] if len(found) == 1 else None


def excuse_new_head(blueprint: PreTrainedModel, info: LoadStateDictInfo) -> None:
    """Let a classifier begin with a language model's weights: its head is new, theirs is not used.

    Args:
        blueprint: On the meta device. Of other models nothing is excused, nor of a classifier
            whose head the files have.
        info: What the files lack and what the model has no place for; changed in place.
    """
    name = class_head_name(blueprint) if is_classifier(blueprint.config) else None
    if name is None:
        return
    own = {f"{name}.{part}" for part, _ in blueprint.get_submodule(name).named_parameters()}
    if not own <= info.missing_keys:
        return
    info.missing_keys -= own
    log.info("%s: the head of the classes is new and starts at random: %s", KEY, listed([*own]))
    if unused := info.unexpected_keys & _language_head(blueprint):
        info.unexpected_keys -= unused
        log.info("%s: a classifier has no use for the files' %s", KEY, listed(sorted(unused)))


def _language_head(blueprint: PreTrainedModel) -> set[str]:
    """Names of the parameters of the head that the language model of a configuration has."""
    if type(blueprint.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return set()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(blueprint.config))
    head = model.get_output_embeddings()
    inside = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    every = model.named_parameters(remove_duplicate=False)
    body = f"{model.base_model_prefix}."
    return {name for name, p in every if id(p) in inside and not name.startswith(body)}
