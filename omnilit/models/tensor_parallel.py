"""Tensor parallelism: each matrix of a model spread over the ranks of one mesh axis.

How, stands in the model's own `tp_plan`, and transformers' functions carry it out, but for three
things. The vocabulary is split the same way in the embeddings and the head, whose loss never
gathers its logits; tied ones stay one parameter. And weights that every rank holds whole but
applies to its own heads get their gradient summed where it is made: transformers sums what has
accumulated, after every backward pass, which counts earlier micro-batches again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from omnilit.errors import ConfigError, Problem
from omnilit.kernels.resolve import Choice, KernelSet
from omnilit.kernels.slots import SLOTS
from omnilit.models import head
from omnilit.models.attention import is_attention
from omnilit.models.families.tensor_plans import SHARED_BIAS, plan_of
from omnilit.parallel.replicated import sum_gradients, sum_values

KEY: Final = "train.accelerator.tp_size"
# Kernels of the head's loss that can do with a part of the vocabulary.
SPLIT_HEADS: Final = ("chunk_loss", "npu")
OWN_HEADS: Final = "replicated_with_grad_allreduce"  # a norm over the heads that a rank has
HEADS: Final = ("num_attention_heads", "num_key_value_heads")
MAX_LISTED: Final = 4


def choose_split_head(kernels: KernelSet) -> KernelSet:
    """The same kernels with a head's loss that takes a part of the vocabulary.

    Raises:
        ConfigError: Another one was given by name.
    """
    choice = kernels.choices[head.FIELD]
    if choice.backend in SPLIT_HEADS:
        return kernels
    if choice.is_given:
        raise ConfigError(
            key=SLOTS[head.FIELD].key,
            problem=f"{choice.backend!r} needs the whole vocabulary, which tp_size splits",
            fix=f"leave it out, or set it to {' or '.join(SPLIT_HEADS)}",
        )
    why = f"{choice.backend} needs the whole vocabulary, which tp_size splits"
    own = Choice("chunk_loss", why, is_given=False)
    return replace(kernels, choices=MappingProxyType({**kernels.choices, head.FIELD: own}))


def split_model(model: PreTrainedModel, mesh: DeviceMesh, *, with_experts: bool = True) -> None:
    """Spread the matrices of `model` over the ranks of `mesh`, in place.

    Args:
        model: Kernels are bound; not yet sharded by FSDP2.
        mesh: One axis, of ranks that are given the same micro-batches.
        with_experts: Split experts too; false where expert parallelism spreads them.

    Raises:
        ConfigError: There is no plan for this model, or something does not divide.
    """
    plan = _read_plan(model, with_experts=with_experts)
    problems = [*_wrong_ends(model), *_uneven_heads(model, plan, mesh.size())]
    problems += problems or _uneven_matrices(model, plan, mesh.size())
    if problems:
        raise ConfigError.of(problems)
    group = mesh.get_group()
    for name, style in list(plan.items()):
        if style == SHARED_BIAS:
            owner, _, attribute = name.rpartition(".")
            _sum_shares(model.get_submodule(owner), attribute, group, share=mesh.size())
        elif style == OWN_HEADS and name in dict(model.named_modules()):
            module = model.get_submodule(name)
            for attribute, _ in module.named_parameters(recurse=False):
                _sum_shares(module, attribute, group, share=1)
        else:
            continue
        del plan[name]
    _split_vocabulary(model, mesh)
    apply_tensor_parallelism(model, mesh, plan)


def _read_plan(model: PreTrainedModel, *, with_experts: bool) -> dict[str, str]:
    """Style by the name of each module and parameter, without embeddings and head."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    ours = plan_of(model.config.get_text_config())
    plan = _expand(model, {**{prefix + name: ours[name] for name in ours}, **model.tp_plan})
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = [name for name, module in model.named_modules() if module in ends]
    if not with_experts:
        left_out += _expand(model, model.ep_plan)
    plan = {
        name: style
        for name, style in plan.items()
        if not any(name == own or name.startswith(f"{own}.") for own in left_out)
    }
    if not plan:
        raise ConfigError(
            key=KEY,
            problem=f"{type(model).__name__} has no plan for splitting its matrices (tp_plan)",
            fix="leave tp_size out, or train a model that has one",
        )
    return plan


def _expand(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    return model._expand_parallel_plan(dict(plan))  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _wrong_ends(model: PreTrainedModel) -> Iterator[Problem]:
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        problem = f"the input embeddings of {type(model).__name__} are {type(embeddings).__name__}"
        yield Problem(KEY, f"{problem}, which cannot be split", "leave tp_size out")


def _uneven_heads(model: PreTrainedModel, plan: Mapping[str, str], size: int) -> Iterator[Problem]:
    """Heads that cannot be dealt out, where the plan deals out heads."""
    attention = [f"{name}." for name, module in model.named_modules() if is_attention(module)]
    inside = {style for name, style in plan.items() if name.startswith(tuple(attention))}
    if "colwise" not in inside:  # whose output is this rank's heads
        return
    config = model.config.get_text_config()
    for name in HEADS:
        number = getattr(config, name, None) or size
        if number % size:
            yield _does_not_divide(f"the {number} heads of {name}", size)


def _uneven_matrices(model: PreTrainedModel, plan: Mapping[str, str], size: int) -> list[Problem]:
    """Dimensions that cannot be split into equal parts."""
    found: dict[str, None] = {}
    vocabulary = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if vocabulary % size:
        found[f"the vocabulary of {vocabulary} tokens"] = None
    for name, parameter in model.named_parameters():
        dim, parts = _split_dimension(name, parameter, plan.get(name, ""))
        if dim is not None and parameter.shape[dim] % (size * parts):
            last = ".".join(name.split(".")[-2:])
            of_each = f", {parts} in one," if parts > 1 else ""
            found[f"dimension {dim} of {last}{of_each} with {parameter.shape[dim]} entries"] = None
    return [_does_not_divide(what, size) for what in list(found)[:MAX_LISTED]]


def _split_dimension(name: str, parameter: Tensor, style: str) -> tuple[int | None, int]:
    """Which dimension of a parameter its style splits, and how many matrices lie in it."""
    parts = 2 if style.startswith("packed") else 1
    if "colwise" in style:
        return max(parameter.ndim - 2, 0), parts
    if "rowwise" in style and not name.endswith(".bias"):
        return parameter.ndim - 1, parts
    return None, parts


def _does_not_divide(what: str, size: int) -> Problem:
    return Problem(KEY, f"{size} ranks cannot split {what} evenly", "choose a tp_size that can")


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
        with _lent(module, attribute, sum_gradients(whole, group) / share):
            return forward(*args, **kwargs)

    module.forward = shared_forward


@contextmanager
def _lent(module: nn.Module, attribute: str, weight: Tensor) -> Iterator[None]:
    """Let the code of `module` find `weight` where it looks for one of its parameters."""
    own = module._parameters  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as transformers does
    kept = own[attribute]
    own[attribute] = cast("nn.Parameter", weight)
    try:
        yield
    finally:
        own[attribute] = kept


def _split_vocabulary(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Give each rank the same rows of the embeddings and of the head, which `HeadLoss` expects."""
    embeddings = cast("nn.Embedding", model.get_input_embeddings())
    last = cast("nn.Linear", model.get_output_embeddings())
    is_tied = last.weight is embeddings.weight
    embeddings.weight = _split_rows(embeddings.weight, mesh)
    last.weight = embeddings.weight if is_tied else _split_rows(last.weight, mesh)
    if last.bias is not None:
        last.bias = _split_rows(last.bias, mesh)
    _look_up_own_rows(embeddings, mesh)


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
        with _lent(embeddings, "weight", own_rows):
            rows = forward(places.masked_fill(is_elsewhere, 0))
        return sum_values(rows.masked_fill(is_elsewhere[..., None], 0.0), group)

    embeddings.forward = split_forward
