"""What of a model is adapted, as `peft` decides it.

peft adapts a copy of the model on the meta device. What it did there is read off: which modules and
parameters, with which rank and strength, and under which names its files have them. The model that
is trained keeps its own modules and names, so that kernels, plans and files fit it as ever.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omnilit.config.lora import LoraArguments
from omnilit.config.lora_rules import GROUP
from omnilit.errors import ConfigError, Problem, suggest
from omnilit.models.class_labels import is_classifier
from omnilit.models.heads import class_head_name, output_head

if TYPE_CHECKING:
    from peft import LoraConfig

NAME: Final = "default"  # of the adapter, inside of peft
PREFIX: Final = "base_model.model."  # of all names in an adapter's file
INSIDE: Final = ".base_layer"  # what peft puts into the name of what it wraps
ALL_LINEAR: Final = "all-linear"


@dataclass(frozen=True, slots=True)
class Adapter:
    """Two factors beside one matrix, or beside the matrices of all experts of a layer.

    R rank, E experts, D inputs, O outputs of the matrix.

    Args:
        module: Name in the model.
        parameter: Which of the module's; None for a linear layer's matrix.
        file_name: Where peft's files have the factors.
        rank: R.
        scaling: What the product of the factors is multiplied by.
        num_inputs: D.
        num_outputs: O.
        num_experts: E; 0 for a single matrix.
        is_transposed: The experts' matrices are stored [E, D, O].
    """

    module: str
    parameter: str | None
    file_name: str
    rank: int
    scaling: float
    num_inputs: int
    num_outputs: int
    num_experts: int = 0
    is_transposed: bool = False

    @property
    def names(self) -> tuple[str, str]:
        """Of the two factors in the model."""
        if self.parameter is None:
            return f"{self.module}.lora_A.weight", f"{self.module}.lora_B.weight"
        holder = f"{self.module}.adapters.{self.parameter}"
        return f"{holder}.lora_A", f"{holder}.lora_B"

    @property
    def file_names(self) -> tuple[str, str]:
        """Of the two factors in a file of peft's."""
        holder = f"{PREFIX}{self.file_name}"
        return f"{holder}.lora_A.weight", f"{holder}.lora_B.weight"

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Of the two factors in the model: [R, D] and [O, R], with E before them where it is."""
        experts = (self.num_experts,) if self.num_experts else ()
        return (
            torch.Size((*experts, self.rank, self.num_inputs)),
            torch.Size((*experts, self.num_outputs, self.rank)),
        )

    @property
    def file_shapes(self) -> tuple[torch.Size, torch.Size]:
        """Of the two factors in a file: [E R, D] and [O, R E]."""
        rows = self.rank * max(self.num_experts, 1)
        return torch.Size((rows, self.num_inputs)), torch.Size((self.num_outputs, rows))

    def to_file(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as a file has them."""
        if not self.num_experts:
            return first, second
        joined = second.permute(1, 2, 0).reshape(self.num_outputs, -1)
        return first.reshape(-1, self.num_inputs), joined.contiguous()

    def from_file(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `to_file`."""
        if not self.num_experts:
            return first, second
        split = second.reshape(self.num_outputs, self.rank, self.num_experts)
        return first.reshape(self.shapes[0]), split.permute(2, 0, 1).contiguous()

    def add_to(self, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The matrix, or the matrices of all experts, with what the factors add."""
        first, second = first.to(weight.dtype), second.to(weight.dtype)
        if not self.num_experts:
            return torch.addmm(weight, second, first, alpha=self.scaling)
        if self.is_transposed:
            first, second = second.transpose(1, 2), first.transpose(1, 2)
        return torch.baddbmm(weight, second, first, alpha=self.scaling)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """All that is trained.

    Args:
        arguments: What was asked for.
        adapters: In the model's order.
        trained: Names of parameters that are trained whole.
        is_classes: The model is a classifier, whose head is among them.
    """

    arguments: LoraArguments
    adapters: tuple[Adapter, ...]
    trained: tuple[str, ...]
    is_classes: bool = False

    def file_names(self) -> dict[str, str]:
        """Names in a file of peft's by those in the model, of all that is trained."""
        own = {name: f"{PREFIX}{name}" for name in self.trained}
        for adapter in self.adapters:
            own.update(zip(adapter.names, adapter.file_names, strict=True))
        return own

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All trained tensors of a model as a file of peft's has them."""
        found = {f"{PREFIX}{name}": tensors[name] for name in self.trained}
        for adapter in self.adapters:
            first, second = (tensors[name] for name in adapter.names)
            pair = adapter.to_file(first, second)
            found.update(zip(adapter.file_names, pair, strict=True))
        return found


def peft_config(
    lora: LoraArguments, *, base: str | None = None, is_classes: bool = False
) -> LoraConfig:
    """The same settings in peft's words.

    Args:
        lora: `model.lora`.
        base: Where the adapted model is.
        is_classes: The model is a classifier.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        problem = "true needs the package peft, which is not installed"
        fix = "pip install 'omnilit[lora]'"
        raise ConfigError(key=f"{GROUP}.enable", problem=problem, fix=fix) from error
    return LoraConfig(
        task_type="SEQ_CLS" if is_classes else "CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=_whole(lora.alpha),
        use_rslora=lora.use_rslora,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules or None,
        target_parameters=list(lora.target_parameters) or None,
        modules_to_save=list(lora.modules_to_save) or None,
    )


def _whole(alpha: float) -> Any:
    """Peft declares a whole number and takes any."""
    return int(alpha) if float(alpha).is_integer() else alpha


def plan_adapters(blueprint: PreTrainedModel, lora: LoraArguments) -> AdapterPlan:
    """Let peft adapt a model, and read off what it did.

    Args:
        blueprint: On the meta device; peft's wrappers are in it afterwards.
        lora: `model.lora`, enabled and good by itself.

    Raises:
        ConfigError: A name matches nothing, or what it matches cannot be adapted here.
    """
    from peft import inject_adapter_in_model

    if problems := _unmatched(blueprint, lora):
        raise ConfigError.of(problems)
    is_classes = is_classifier(blueprint.config)
    head = class_head_name(blueprint) if is_classes else None
    if head is not None and head not in lora.modules_to_save:  # it knows nothing of the classes yet
        lora = replace(lora, modules_to_save=[*lora.modules_to_save, head])
    config = peft_config(lora, is_classes=is_classes)
    both = (blueprint.get_input_embeddings(), output_head(blueprint))
    ends = {id(module): module for module in both if module is not None}
    users = [id(p) for _, p in blueprint.named_parameters(remove_duplicate=False)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what matched nothing: that was checked, or is next
            inject_adapter_in_model(config, blueprint)
    except ValueError as error:  # peft's word for all that it cannot adapt
        fix = f"name layers that there are, or {ALL_LINEAR}"
        raise _wrong("target_modules", _first_line(error), fix) from error
    adapters = tuple(_read_adapters(blueprint, ends))
    trained = tuple(_read_trained(blueprint, users))
    if not adapters:
        raise _wrong("target_modules", "peft adapts nothing", f"use {ALL_LINEAR}")
    return AdapterPlan(replace(lora), adapters, trained, is_classes)


def _wrong(field: str, problem: str, fix: str) -> ConfigError:
    return ConfigError(key=f"{GROUP}.{field}", problem=problem, fix=fix)


def _unmatched(model: PreTrainedModel, lora: LoraArguments) -> Iterator[Problem] | list[Problem]:
    """A problem for each name that is of nothing in the model."""
    modules = [name for name, _ in model.named_modules() if name]
    linear = _ends(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    parameters = [name for name, _ in model.named_parameters()]
    stacked = _ends(name for name, p in model.named_parameters() if p.ndim == 3)
    every = [
        ("target_modules", lora.target_modules, [*modules, *_old_names(model)], linear),
        ("exclude_modules", lora.exclude_modules, modules, linear),
        ("target_parameters", lora.target_parameters, parameters, stacked or _ends(parameters)),
        ("modules_to_save", lora.modules_to_save, modules, _ends(modules)),
    ]
    found: list[Problem] = []
    for field, entries, names, known in every:
        for entry in entries if isinstance(entries, list) else [entries] if entries else []:
            matches = _regular(entries) if isinstance(entries, str) else _by_end(entry)
            if entry == ALL_LINEAR or (matches and any(map(matches, names))):
                continue
            problem = f"{entry!r} matches nothing in the model.{suggest(entry, known)}"
            fix = f"use some of {', '.join(known)}"
            found.append(Problem(f"{GROUP}.{field}", problem, fix))
    return found


def _by_end(entry: str) -> Callable[[str], bool]:
    return lambda name: name == entry or name.endswith(f".{entry}")


def _regular(pattern: str) -> Callable[[str], object] | None:
    try:
        return re.compile(pattern).fullmatch
    except re.error:
        return None


def _ends(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _old_names(model: PreTrainedModel) -> list[str]:
    """What experts were called before transformers stacked them; peft still takes these names."""
    has_stacked = any(p.ndim == 3 for p in model.parameters())
    return ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"] if has_stacked else []


def _read_adapters(model: PreTrainedModel, ends: Mapping[int, nn.Module]) -> Iterator[Adapter]:
    from peft.tuners.lora import LoraLayer

    for file_name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer, nn.Module):
            continue
        name = file_name.replace(INSIDE, "")
        base = layer.get_base_layer()
        if id(base) in ends:
            fix = "leave it out, or train it whole: modules_to_save"
            raise _wrong("target_modules", f"{name} embeds or predicts tokens", fix)
        parameter: str | None = getattr(layer, "parameter_name", None)
        if parameter is None and not isinstance(base, nn.Linear):
            problem = f"{name} is a {type(base).__name__}, and only linear layers can be adapted"
            raise _wrong("target_modules", problem, "leave it out")
        stacked = parameter is not None and base.get_parameter(parameter).ndim == 3
        yield Adapter(
            module=name,
            parameter=parameter,
            file_name=file_name,
            rank=layer.r[NAME],
            scaling=layer.scaling[NAME],
            num_inputs=int(layer.in_features or 0),
            num_outputs=int(layer.out_features or 0),
            num_experts=base.get_parameter(str(parameter)).shape[0] if stacked else 0,
            is_transposed=stacked and bool(getattr(base, "is_transposed", False)),
        )


def _read_trained(model: PreTrainedModel, users: list[int]) -> Iterator[str]:
    """Names of all parameters of modules that are trained whole."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for inside, parameter in module.original_module.named_parameters():
            if users.count(id(parameter)) > 1:
                problem = f"{name} shares {inside} with another module of the model"
                raise _wrong("modules_to_save", problem, "leave it out, or untie the model")
            yield f"{name}.{inside}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def same_strength(one: Mapping[str, Any], lora: LoraArguments) -> list[str]:
    """Fields of saved arguments that would make the same factors another model now."""
    read = ("rank", "alpha", "use_rslora")
    now = {entry.name: getattr(lora, entry.name) for entry in fields(lora)}
    return [name for name in read if name in one and one[name] != now[name]]
