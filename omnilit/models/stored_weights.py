"""Weights as files hold them: any part of a tensor of the model, read and converted alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.loading_report import LoadStateDictInfo

from omnilit.logging import get_logger
from omnilit.models.heads import excuse_new_head
from omnilit.models.weight_report import Mismatch, judge, unreadable
from omnilit.parallel.local import local_part
from omnilit.parallel.materialize import Part, copy_part, named_tensors, own_part, pieces

MIB: Final = 2**20
NUM_COMPARED: Final = 2**22  # elements of two files' tensors that are compared at a time
READING: Final = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
log = get_logger(__name__)


class StoredTensor(Protocol):
    """A tensor of a file, of which any part can be read alone; safetensors' slices are such."""

    def get_shape(self) -> list[int]:
        """Its shape, from the file's header."""
        ...

    def __getitem__(self, part: Any) -> Tensor:
        """Read a part, given as slices."""
        ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """Tensors of files that together become one or more tensors of the model.

    Args:
        first: Name of the first tensor that it makes.
        transform: transformers' own conversion, or a mere renaming.
        sources: By the conversion's pattern, the names in the files in their order.
        shapes: By name in the model, the whole shape that comes out.
    """

    first: str
    transform: WeightTransform
    sources: dict[str, list[str]]
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def make(
        self, tensors: Mapping[str, list[Tensor]], blueprint: PreTrainedModel
    ) -> dict[str, Tensor]:
        """Convert tensors given by pattern, real or on the meta device, to the model's own."""
        transform = deepcopy(self.transform)
        for pattern, parts in tensors.items():
            for part in parts:
                transform.add_tensor(self.first, pattern, pattern, part)  # pyright: ignore[reportArgumentType]
        info = LoadStateDictInfo(set(), set(), set(), [], {}, set())
        try:
            made = transform.convert(  # pyright: ignore[reportAttributeAccessIssue]
                self.first, model=blueprint, config=blueprint.config, loading_info=info
            )
        except SkipParameters as error:
            reason = info.conversion_errors[self.first].strip().splitlines()[-1]
            raise ValueError(f"{self.first} cannot be converted: {reason}") from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def keeps_rows(self) -> bool:
        """Whether one file tensor makes one row, so that a rank needs only those of its rows.

        So are experts stored: one matrix each, stacked, and perhaps joined with others beside.
        """
        if not isinstance(self.transform, WeightConverter) or len(self.shapes) != 1:
            return False
        stack, *others = self.transform.operations
        (shape,) = self.shapes.values()
        return (
            type(stack) is MergeModulelist
            and stack.dim == 0
            and all(type(other) is Concatenate and other.dim > 0 for other in others)
            and all(len(names) == shape[0] for names in self.sources.values())
        )


@dataclass(slots=True)
class Files:
    """The tensors of a folder of safetensors, open, with a count of what was read of them.

    Args:
        path: Where they are.
        tensors: By name.
        read_bytes: Of the tensors, so far.
        converted: What the last conversion made, by a key that says of what.
    """

    path: str
    tensors: dict[str, StoredTensor]
    read_bytes: int = 0
    converted: tuple[object, dict[str, Tensor]] = (None, {})

    def read(self, name: str, part: Part = (), dtype: torch.dtype | None = None) -> Tensor:
        """A part of one tensor; all of it by default."""
        spans = tuple(p if isinstance(p, slice) else _span(p) for p in part)
        tensor = self.tensors[name][spans or ...]  # a scalar has no slices
        self.read_bytes += tensor.numel() * tensor.element_size()
        for dim, positions in enumerate(part):
            if isinstance(positions, Tensor):  # not of one piece, which files cannot be asked for
                tensor = tensor.index_select(dim, positions - positions[0])
        return tensor.to(dtype)


@dataclass(frozen=True, slots=True)
class StoredValues:
    """One tensor of the model, of which any part can be read alone, with as little else as can be.

    Args:
        name: In the model.
        recipe: What makes it.
        files: Open.
        blueprint: The model on the meta device.
        dtype: In which conversions compute.
    """

    name: str
    recipe: Recipe
    files: Files
    blueprint: PreTrainedModel
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.recipe.shapes[self.name]

    def __getitem__(self, part: Part) -> Tensor:
        """Read a part.

        Raises:
            ConfigError: It cannot be read or converted.
        """
        try:
            return self._read(part)
        except READING as error:
            raise unreadable(self.files.path, error) from error

    def _read(self, part: Part) -> Tensor:
        recipe = self.recipe
        if isinstance(recipe.transform, WeightRenaming):
            ((source, *_), *_) = recipe.sources.values()
            return self.files.read(source, part)
        rows, *others = part
        if not isinstance(rows, slice) or not recipe.keeps_rows():
            return self._convert(slice(None))[self.name][part]
        return self._convert(rows)[self.name][(slice(None), *others)]

    def _convert(self, rows: slice) -> dict[str, Tensor]:
        """What the recipe makes of so many tensors of each pattern.

        Kept until another is asked for: a conversion may make several tensors, and a tensor may
        be read in several pieces.
        """
        key = (self.recipe.first, rows.start, rows.stop)
        if self.files.converted[0] != key:
            self.files.converted = (None, {})  # not two at a time
            tensors = {
                pattern: [self.files.read(name, dtype=self.dtype) for name in names[rows]]
                for pattern, names in self.recipe.sources.items()
            }
            self.files.converted = (key, self.recipe.make(tensors, self.blueprint))
        return self.files.converted[1]


@dataclass(frozen=True, slots=True)
class OwnRead:
    """What one rank read.

    Args:
        absent: Names of tensors that still have no value, such as buffers that are never saved;
            the same on every rank.
        num_bytes: Of this rank, of the files' tensors.
    """

    absent: set[str]
    num_bytes: int


def read_own_weights(
    model: PreTrainedModel, model_path: str, *, blueprint: PreTrainedModel, strict: bool
) -> OwnRead:
    """Fill this rank's part of every tensor that the files hold; nothing is sent.

    Args:
        model: Materialised, sharded or not.
        model_path: A folder or a hub name.
        blueprint: The same model on the meta device, not sharded, without kernels.
        strict: Whether every name must be found and none be left over.

    Raises:
        ConfigError: The files cannot be read or, when `strict`, do not match by name and shape.
    """
    own = named_tensors(model)
    try:
        paths = weight_files(model_path)
        with ExitStack() as stack:
            files = _open(model_path, paths, stack)
            found, absent = _match(files, blueprint, strict=strict)
            untied: list[str] = []
            for name, twins in found.items():
                if name in own:  # else another stage's
                    untied += _fill_own(own[name], twins)
            judge(model_path, Mismatch(untied=untied), strict=strict)
    except READING as error:
        raise unreadable(model_path, error) from error
    whole = sum(Path(path).stat().st_size for path in paths)
    log.info("weights: this rank read %.1f of %.1f MiB", files.read_bytes / MIB, whole / MIB)
    return OwnRead(absent, files.read_bytes)


def stored_tensors(
    model_path: str, *, blueprint: PreTrainedModel, strict: bool, absent: set[str]
) -> Iterator[tuple[str, StoredValues]]:
    """All tensors that the files hold, of which no more is read than is asked for.

    Args:
        model_path: A folder or a hub name.
        blueprint: The model on the meta device: its names, shapes and dtype are what is wanted.
        strict: Whether every name must be found and none be left over.
        absent: Gets the names of tensors that have no value here, such as buffers.

    Yields:
        Name and values, which can be read until the next ones are asked for.

    Raises:
        ConfigError: The files cannot be read or, when `strict`, do not match by name and shape.
    """
    with ExitStack() as stack:
        try:
            files = _open(model_path, weight_files(model_path), stack)
            found, without = _match(files, blueprint, strict=strict)
        except READING as error:
            raise unreadable(model_path, error) from error
        absent |= without
        untied = [
            twin.name
            for first, *others in found.values()
            for twin in others
            if not _is_equal(first, twin)
        ]
        judge(model_path, Mismatch(untied=untied), strict=strict)
        yield from ((name, first) for name, (first, *_) in found.items())


def _match(
    files: Files, blueprint: PreTrainedModel, *, strict: bool
) -> tuple[dict[str, list[StoredValues]], set[str]]:
    """What the files hold for each tensor of the model, more than once where it is tied.

    Returns:
        That, and the names that have no value.
    """
    recipes, unexpected = plan_recipes(blueprint, files.tensors)
    makers = {name: recipe for recipe in recipes for name in recipe.shapes}
    mismatch, twins = compare(blueprint, makers, unexpected)
    judge(files.path, mismatch, strict=strict)
    wanted = named_tensors(blueprint)
    found = {
        name: [StoredValues(n, makers[n], files, blueprint, wanted[name].dtype) for n in held]
        for name, held in twins.items()
        if name not in mismatch.absent
    }
    return found, wanted.keys() - found.keys()


def _fill_own(parameter: Tensor, twins: Sequence[StoredValues]) -> list[str]:
    """Fill this rank's part of a tensor; returns ties that the files contradict."""
    part = own_part(parameter)
    if part is None:  # all of it belongs to other ranks
        return []
    first, *others = twins
    copy_part(parameter, first[part])
    local = local_part(parameter)
    return [
        twin.name
        for twin in others
        if not torch.equal(local, twin[part].to(parameter.device, parameter.dtype))
    ]


def _is_equal(one: StoredValues, other: StoredValues) -> bool:
    return all(
        torch.equal(one[box].to(one.dtype), other[box].to(one.dtype))
        for box in pieces(one.shape, NUM_COMPARED)
    )


def weight_files(model_path: str) -> list[str]:
    """The safetensors of a folder or a hub name, in the order of their names.

    Raises:
        OSError: There are none.
    """
    local = Path(model_path).expanduser()
    name = str(local) if local.exists() else model_path
    missing_is_fine = {"_raise_exceptions_for_missing_entries": False}
    if whole := cached_file(name, SAFE_WEIGHTS_NAME, **missing_is_fine):
        return [whole]
    if index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **missing_is_fine):
        return get_checkpoint_shard_files(name, index)[0] or []
    raise FileNotFoundError(f"there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")


def _open(model_path: str, paths: list[str], stack: ExitStack) -> Files:
    files = Files(model_path, {})
    for path in paths:
        opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        files.tensors.update((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118
    return files


def plan_recipes(
    blueprint: PreTrainedModel, stored: Mapping[str, StoredTensor]
) -> tuple[list[Recipe], set[str]]:
    """How the stored tensors become the model's, known from names and shapes alone.

    Returns:
        The recipes, and the names that the model has no place for.

    Raises:
        ValueError: A conversion cannot take what is stored.
    """
    mapping = get_model_conversion_mapping(blueprint)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = blueprint.state_dict(), blueprint.base_model_prefix
    recipes: dict[str, Recipe] = {}
    unexpected: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            unexpected.add(target)
            continue
        plain = WeightRenaming(name, target) if pattern is None else by_pattern[pattern]
        recipe = recipes.setdefault(target, Recipe(target, plain, defaultdict(list)))
        recipe.sources[name if pattern is None else pattern].append(name)
    for recipe in recipes.values():
        blanks = {
            pattern: [torch.empty(stored[n].get_shape(), device="meta") for n in names]
            for pattern, names in recipe.sources.items()
        }
        if isinstance(recipe.transform, WeightRenaming):
            ((blank, *_), *_) = blanks.values()
            recipe.shapes[recipe.first] = blank.shape
        else:
            recipe.shapes.update((n, t.shape) for n, t in recipe.make(blanks, blueprint).items())
    return list(recipes.values()), unexpected


def compare(
    blueprint: PreTrainedModel, makers: Mapping[str, Recipe], unexpected: set[str]
) -> tuple[Mismatch, dict[str, list[str]]]:
    """Where files and model differ by name or shape, and which names share one tensor.

    Returns:
        The differences, and by the name of each tensor of the model those among its own name and
        its ties that the files hold.
    """
    first: dict[int, str] = {}
    twins: defaultdict[str, list[str]] = defaultdict(list)
    every = [*blueprint.named_parameters(remove_duplicate=False), *blueprint.named_buffers()]
    for name, tensor in every:
        own = first.setdefault(id(tensor), name)
        if name in makers:
            twins[own].append(name)
    saved, tensors = blueprint.state_dict().keys(), named_tensors(blueprint)
    info = LoadStateDictInfo(
        {name for name in tensors if name in saved and name not in twins},
        unexpected,
        set(),
        [],
        {},
        set(),
    )
    blueprint._adjust_missing_and_unexpected_keys(info)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - families name what may differ
    excuse_new_head(blueprint, info)
    shapes = [
        (name, makers[held[0]].shapes[held[0]], tensors[name].shape)
        for name, held in twins.items()
        if makers[held[0]].shapes[held[0]] != tensors[name].shape
    ]
    mismatch = Mismatch(info.missing_keys, info.unexpected_keys, shapes)
    return mismatch, dict(twins)


def _span(positions: Tensor) -> slice:
    return slice(int(positions[0]), int(positions[-1]) + 1)
