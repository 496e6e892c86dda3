"""Cutting a model into pipeline stages, by what transformers says of it (`pp_plan`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from typing_extensions import override

from omnilit.config.parallel_sizes import ACCELERATOR
from omnilit.errors import ConfigError, Problem
from omnilit.models.class_head import PADDING, LastPlace
from omnilit.models.class_labels import is_classifier
from omnilit.models.head_form import read_head
from omnilit.models.heads import class_head_name
from omnilit.models.weight_report import listed

ModuleT = TypeVar("ModuleT", bound=nn.Module)
KEY: Final = f"{ACCELERATOR}.pp_size"
FIX: Final = "leave pp_size out, or train another model"
# What a family's own code may raise where it finds no layer, or what it expects of one
FAILURES: Final = (
    *(AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
PROBE: Final = (1, 4)  # batch and tokens that tell whether a stage passes on what it is given


@dataclass(frozen=True, slots=True)
class CutPlan:
    """The modules of a model in the order in which they run.

    Args:
        first: Names of those that only the first stage runs: the embedding.
        stack: Name of the list of layers that is cut.
        last: Names of those that only the last stage runs: norm and head.
    """

    first: tuple[str, ...]
    stack: str
    last: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> CutPlan:
        """Read the plan of a model.

        Raises:
            ConfigError: It has none, or one that leaves parameters out.
        """
        inner = f"{model.base_model_prefix}." if model.base_model is not model else ""
        base: Mapping[str, object] = model.config.get_text_config().base_model_pp_plan or {}
        own: Mapping[str, object] = model._pp_plan or {}  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if is_classifier(model.config):  # whose own plan ends before its head
            own = {**own, str(class_head_name(model)): None}
        names = list(dict.fromkeys([*(inner + name for name in base), *own]))
        modules = dict(model.named_modules())
        stacks = [name for name in names if isinstance(modules.get(name), nn.ModuleList)]
        if len(stacks) != 1 or not own:
            raise _uncut(model, "transformers does not say how it is cut into stages (pp_plan)")
        place = names.index(stacks[0])
        plan = cls(tuple(names[:place]), stacks[0], tuple(names[place + 1 :]))
        if left := plan._left_out(model):
            raise _uncut(model, f"no stage of its pp_plan has {listed(left)}")
        return plan

    @property
    def names(self) -> tuple[str, ...]:
        """All that some stages have and others do not."""
        return (*self.first, self.stack, *self.last)

    def _left_out(self, model: PreTrainedModel) -> list[str]:
        return [
            name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if not any(name.startswith(f"{part}.") for part in self.names)
        ]


@dataclass(frozen=True, slots=True)
class StageRange:
    """The layers of a stage: `start` up to `stop`.

    Args:
        number: Of the stage.
        num_stages: Of the model.
        start: Its first layer.
        stop: The first one behind it.
    """

    number: int
    num_stages: int
    start: int
    stop: int

    @classmethod
    def of(cls, number: int, *, num_stages: int, num_layers: int) -> StageRange:
        """An even share: numbers of layers differ by one at most."""
        start, stop = (n * num_layers // num_stages for n in (number, number + 1))
        return cls(number, num_stages, start, stop)

    @property
    def is_first(self) -> bool:
        """Whether token ids go in."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether losses come out."""
        return self.number == self.num_stages - 1


def own_stages(rank: int, *, size: int, num_stages: int, num_layers: int) -> list[StageRange]:
    """The stages of one rank of a pipeline of `size`: every `size`-th."""
    return [
        StageRange.of(number, num_stages=num_stages, num_layers=num_layers)
        for number in range(rank, num_stages, size)
    ]


def cut_model(model: PreTrainedModel, stages: Sequence[StageRange]) -> list[PreTrainedModel]:
    """Leave of a model what `stages` need, in place, and make a model of each of them.

    What a stage does not own stands as an identity in its place, so names stay those of the whole
    model. With one stage that is the model itself; of several each gets a frame of its own around
    modules that are those of `model`.

    Args:
        model: Kernels are bound; not yet sharded.
        stages: Those of one rank.

    Returns:
        One model a stage.

    Raises:
        ConfigError: The model cannot be cut.
    """
    plan = CutPlan.of(model)
    keep_only(model, plan, stages)
    if len(stages) == 1:
        return [model]
    frames = [_frame(model, plan.names) for _ in stages]
    for frame, stage in zip(frames, stages, strict=True):
        keep_only(frame, plan, [stage])
    return frames


def keep_only(model: PreTrainedModel, plan: CutPlan, stages: Iterable[StageRange]) -> None:
    """Put identities in place of all that none of `stages` owns."""
    stages = list(stages)
    layers = model.get_submodule(plan.stack)
    assert isinstance(layers, nn.ModuleList)
    for index in range(len(layers)):
        if not any(stage.start <= index < stage.stop for stage in stages):
            layers[index] = PipelineIdentityLayer()
    left: list[str] = []
    if not any(stage.is_first for stage in stages):
        left += plan.first
    if not any(stage.is_last for stage in stages):
        left += plan.last[:-1]
        handover = LastPlace() if is_classifier(model.config) else _Handover()
        model.set_submodule(plan.last[-1], handover, strict=True)
    for name in left:
        model.set_submodule(name, PipelineIdentityLayer(), strict=True)


class _Handover(nn.Module):
    """In place of the head: the hidden states, in memory of their own.

    The model takes a slice of them for its head, and FSDP2 warns of a view as its unit's output.
    """

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def _frame(model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """A copy of the modules around those of `names`, which it shares with the model.

    Args:
        model: Its frame are the modules on the way to `names`, and the lists among them.
        names: What is put somewhere else, or replaced, in the copy.
    """
    frame = _copy_module(model)
    copied: dict[str, nn.Module] = {"": frame}
    for name in names:
        parts = name.split(".")
        ways = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        for way in ways:
            module = model.get_submodule(way)
            if way in copied or (way == name and not isinstance(module, nn.ModuleList)):
                continue
            parent, _, own = way.rpartition(".")
            copied[way] = _copy_module(module)
            copied[parent]._modules[own] = copied[way]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return frame


def _copy_module(module: ModuleT) -> ModuleT:
    """Another module with the same children and hooks, in dictionaries of its own.

    The dictionaries of tensors are the module's own: what gets memory there has it here.
    """
    twin, tensors = copy.copy(module), ("_parameters", "_buffers")
    own = {name: held for name, held in vars(module).items() if name not in tensors}
    vars(twin).update(
        {name: copy.copy(held) for name, held in own.items() if isinstance(held, dict)}
    )
    return twin


def find_uncut(model: PreTrainedModel) -> list[Problem]:
    """Why a model cannot be cut into stages; nothing where it can. See `check_cut`."""
    try:
        check_cut(model)
    except ConfigError as error:
        return list(error.problems)
    return []


def check_cut(model: PreTrainedModel) -> None:
    """Check that what stands between the stages of a model is passed on as it is.

    A model may scale its embeddings, or add to them, outside of the modules that are cut: every
    stage would do it again. So the model runs without any of those, and must give what it got.

    Args:
        model: On any device; only its code is used.

    Raises:
        ConfigError: It cannot be cut into stages.
    """
    plan = CutPlan.of(model)
    frame = _frame(model, plan.names)
    keep_only(frame, plan, [])
    given = torch.randn(*PROBE, model.config.get_text_config().hidden_size)
    positions = torch.arange(PROBE[1])[None]
    frame = copy.deepcopy(frame).to_empty(device="cpu")  # tables of positions are all that is left
    frame.config.get_text_config().output_router_logits = False  # without layers there are none
    if is_classifier(model.config):
        alone = PADDING.replaced(frame, None)
    else:
        alone = read_head(model, plan.last[-1]).taken_out(frame)
    try:
        with torch.no_grad(), alone:  # of what is done to logits, and these are none
            output = frame(inputs_embeds=given, position_ids=positions, use_cache=False).logits
    except FAILURES as error:
        raise _uncut(model, f"its own code does not run without its layers ({error})") from error
    if output.shape != given.shape or not torch.equal(output, given):
        raise _uncut(
            model,
            "its own code changes what one layer hands to the next, and stages would repeat it",
        )


def _uncut(model: PreTrainedModel, why: str) -> ConfigError:
    problem = f"{type(model).__name__} cannot be cut into stages: {why}"
    return ConfigError(key=KEY, problem=problem, fix=FIX)
