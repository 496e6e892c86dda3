"""Tensor parallelism: each matrix of a model spread over the ranks of one mesh axis.

How, stands in the model's own `tp_plan`, and transformers' functions carry it out, but for three
things. The vocabulary is split the same way in the embeddings and the head, whose loss never
gathers its logits; tied ones stay one parameter. And weights that every rank holds whole but
applies to its own heads get their gradient summed where it is made: transformers sums what has
accumulated, after every backward pass, which counts earlier micro-batches again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from omnilit.config import tensor_rules
from omnilit.config.tensor_rules import TP as KEY
from omnilit.errors import ConfigError, Problem
from omnilit.kernels.resolve import Choice, KernelSet
from omnilit.models import head
from omnilit.models.class_labels import is_classifier
from omnilit.models.families.tensor_plans import OWN_HEADS, SHARED_BIAS, plan_of
from omnilit.models.heads import output_head
from omnilit.models.lent import lent
from omnilit.parallel.replicated import sum_gradients, sum_values

MAX_LISTED: Final = 4


def fit_kernels(kernels: KernelSet, *, tp_size: int, is_compiled: bool) -> KernelSet:
    """The same kernels with a head's loss that takes a part of the vocabulary, where it is split.

    Args:
        kernels: As chosen for this machine.
        tp_size: Ranks that split each matrix.
        is_compiled: Whether blocks are to be compiled.

    Raises:
        ConfigError: Another one was given by name, or blocks are to be split and compiled.
    """
    if problems := tensor_rules.compile_problems(tp_size=tp_size, is_compiled=is_compiled):
        raise ConfigError.of(problems)
    choice = kernels.choices[head.FIELD]
    if tp_size == 1 or choice.backend in tensor_rules.SPLIT_HEADS:
        return kernels
    if choice.is_given:
        raise ConfigError.of([tensor_rules.whole_head(choice.backend)])
    why = f"{choice.backend} {tensor_rules.NEEDS_ALL}"
    own = Choice("chunk_loss", why, is_given=False)
    return replace(kernels, choices=MappingProxyType({**kernels.choices, head.FIELD: own}))


def split_model(model: PreTrainedModel, mesh: DeviceMesh, *, with_experts: bool = True) -> None:
    """Spread the matrices of `model` over the ranks of `mesh`, in place.

    Args:
        model: Kernels are bound; not yet sharded by FSDP2.
        mesh: One axis, of ranks that are given the same micro-batches; nothing is split over one.
        with_experts: Split experts too; false where expert parallelism spreads them.

    Raises:
        ConfigError: Something cannot be split into equal parts.
    """
    if mesh.size() == 1:
        return
    plan = read_plan(model, with_experts=with_experts)
    if problems := _unsplittable(model, plan, mesh.size()):
        raise ConfigError.of(problems)
    group, modules = mesh.get_group(), dict(model.named_modules())
    for name, style in list(plan.items()):
        if style == SHARED_BIAS:
            owner, _, attribute = name.rpartition(".")
            _sum_shares(modules[owner], attribute, group, share=mesh.size())
        elif style == OWN_HEADS and name in modules:
            for attribute, _ in modules[name].named_parameters(recurse=False):
                _sum_shares(modules[name], attribute, group, share=1)
        else:
            continue
        del plan[name]
    _split_vocabulary(model, mesh)
    apply_tensor_parallelism(model, mesh, plan)


def find_unsplit(model: PreTrainedModel, *, tp_size: int, with_experts: bool) -> list[Problem]:
    """What of a model cannot be split into equal parts; nothing where all can.

    Args:
        model: One that has a plan, and heads that divide; on the meta device or real.
        tp_size: Ranks that split each matrix.
        with_experts: See `split_model`.
    """
    return _unsplittable(model, read_plan(model, with_experts=with_experts), tp_size)


def read_plan(model: PreTrainedModel, *, with_experts: bool) -> dict[str, str]:
    """Style by the name of each module and parameter, without embeddings and head.

    Args:
        model: Split already or not.
        with_experts: See `split_model`.
    """
    ours, decoder = plan_of(model.config.get_text_config()), model.get_decoder()
    names = [f"{name}." for name, module in model.named_modules() if module is decoder]
    prefix = next((name for name in names if name != "."), "")
    plan = _expand(model, {**{prefix + name: ours[name] for name in ours}, **model.tp_plan})
    ends = (model.get_input_embeddings(), output_head(model))
    left_out = [name for name, module in model.named_modules() if module in ends]
    if not with_experts:
        left_out += _expand(model, model.ep_plan)
    return {
        name: style
        for name, style in plan.items()
        if not any(name == own or name.startswith(f"{own}.") for own in left_out)
    }


def _expand(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    return model._expand_parallel_plan(dict(plan))  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _unsplittable(model: PreTrainedModel, plan: Mapping[str, str], size: int) -> list[Problem]:
    """What cannot be split into equal parts; heads were checked with the model's numbers."""
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        problem = f"the input embeddings of {type(model).__name__} are {type(embeddings).__name__}"
        return [Problem(KEY, f"{problem}, which cannot be split", "leave tp_size out")]
    found: dict[str, None] = {}
    if embeddings.num_embeddings % size:
        found[f"the vocabulary of {embeddings.num_embeddings} tokens"] = None
    for name, parameter in model.named_parameters():
        dim, parts = _split_dimension(name, parameter, plan.get(name, ""))
        if dim == 0 and parts > 1 and parameter.ndim > 1:
            # FSDP2 cuts the same dimension, and would take rows of one matrix for the other's
            problem = f"{name} holds {parts} matrices in rows, which cannot be split and sharded"
            return [Problem(KEY, problem, "leave tp_size out")]
        if dim is not None and parameter.shape[dim] % (size * parts):
            last = ".".join(name.split(".")[-2:])
            entries = f"{parameter.shape[dim]} entries" + (f", {parts} matrices" * (parts > 1))
            found[f"dimension {dim} of {last} ({entries})"] = None
    fix = "choose a tp_size that can"
    listed = list(found)[:MAX_LISTED]
    return [Problem(KEY, f"{size} ranks cannot split {what} evenly", fix) for what in listed]


def _split_dimension(name: str, parameter: Tensor, style: str) -> tuple[int | None, int]:
    """Which dimension of a parameter its style splits, and how many matrices lie in it."""
    parts = 2 if style.startswith("packed") else 1
    if "colwise" in style:
        return max(parameter.ndim - 2, 0), parts
    if "rowwise" in style and not name.endswith(".bias"):
        return parameter.ndim - 1, parts
    return None, parts


def _sum_shares(module: nn.Module, attribute: str, group: ProcessGroup, *, share: int) -> None:
    """Let each rank use its share of a weight that all hold whole, and sum the gradients of all.

    Args:
        module: Its forward is replaced.
        attribute: The weight's name in it.
        group: The ranks.
        share: How many times the ranks add up what the weight does.
    """
    forward = module.forward

    def shared_forward(*args: Any, **kwargs: Any) -> Any:
        whole = module.get_parameter(attribute)
        with lent(module, attribute, sum_gradients(whole, group) / share):
            return forward(*args, **kwargs)

    module.forward = shared_forward


def _split_vocabulary(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Give each rank the same rows of the embeddings and of the head, which `HeadLoss` expects.

    A classifier's head has few rows, and every rank has them all.
    """
    embeddings = cast("nn.Embedding", model.get_input_embeddings())
    before = embeddings.weight
    embeddings.weight = _split_rows(before, mesh)
    _look_up_own_rows(embeddings, mesh)
    if is_classifier(model.config):
        return
    last = cast("nn.Linear", model.get_output_embeddings())
    last.weight = embeddings.weight if last.weight is before else _split_rows(last.weight, mesh)
    if last.bias is not None:
        last.bias = _split_rows(last.bias, mesh)


def _split_rows(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    split = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(split, requires_grad=parameter.requires_grad)


def _look_up_own_rows(embeddings: nn.Embedding, mesh: DeviceMesh) -> None:
    """Look tokens up where their rows are: zeros elsewhere, then the sum over ranks."""
    num_rows, group = embeddings.num_embeddings // mesh.size(), mesh.get_group()
    first, forward = mesh.get_local_rank() * num_rows, embeddings.forward
    if embeddings.padding_idx is not None:  # the row that learns nothing
        place = embeddings.padding_idx - first
        embeddings.padding_idx = place if 0 <= place < num_rows else None

    def split_forward(input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        places = input - first
        is_elsewhere = (places < 0) | (places >= num_rows)
        own_rows = cast("DTensor", embeddings.weight).to_local()
        with lent(embeddings, "weight", own_rows):
            rows = forward(places.masked_fill(is_elsewhere, 0))
        return sum_values(rows.masked_fill(is_elsewhere[..., None], 0.0), group)

    embeddings.forward = split_forward
