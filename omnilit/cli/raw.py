"""What a user gave, before anything is checked: files and flags merged into one tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnilit.config.coerce import CoercionError, is_interpolation, parse_flag
from omnilit.config.schema import Field
from omnilit.errors import ConfigError, Problem

Tree = dict[str, Any]
# Not fields of a task: they say which one
MODEL_TYPES: Final = {"model": str | dict, "model.class_path": str}


@dataclass(frozen=True, slots=True)
class Command:
    """A verb's arguments, taken apart.

    Args:
        files: Configuration files, later ones over earlier ones.
        flags: Dotted path of each flag, in order, and the words after it, not yet read: that
            takes the type of the field.
        help_group: None without `--help`; "" for all of ours, else the group asked for.
        is_print_config: Print the configuration and stop.
    """

    files: tuple[Path, ...] = ()
    flags: tuple[tuple[str, tuple[str, ...]], ...] = ()
    help_group: str | None = None
    is_print_config: bool = False


@dataclass(frozen=True, slots=True)
class RawConfig:
    """What was given, with and without its interpolations.

    Args:
        written: Files and flags merged, `${...}` kept.
        resolved: The same with `${...}` replaced.
        problems: Interpolations that cannot be resolved, and flags without their value.
    """

    written: Tree
    resolved: Tree
    problems: tuple[Problem, ...] = ()


def read_command(argv: Sequence[str]) -> Command:
    """Take apart the words after a verb.

    A flag is `--path value`, `--path=value`, or `--path` alone for true.

    Raises:
        ConfigError: A word that belongs to no flag.
    """
    files: list[Path] = []
    flags: list[tuple[str, tuple[str, ...]]] = []
    help_group: str | None = None
    is_print_config = False
    for name, values in _split_flags(argv):
        if name in ("help", "h"):
            help_group = values[0] if values else ""
        elif name == "print_config":
            is_print_config = True
        elif name in ("config", "c"):
            files += [Path(value) for value in values]
        else:
            flags.append((name, tuple(values)))
    return Command(tuple(files), tuple(flags), help_group, is_print_config)


def _split_flags(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    name: str | None = None
    values: list[str] = []
    for word in argv:
        if word.startswith("--") or word in ("-h", "-c"):
            if name is not None:
                yield name, values
            name, separator, value = word.lstrip("-").partition("=")
            values = [value] if separator else []
        elif name is None:
            raise ConfigError(
                key="command line",
                problem=f"{word!r} belongs to no flag",
                fix="write --config FILE, or --path.to.field VALUE",
            )
        else:
            values.append(word)
    if name is not None:
        yield name, values


def merge(command: Command, fields: Iterable[Field] = ()) -> RawConfig:
    """Read the files and lay the flags over them.

    Args:
        command: Names the files and holds the flags.
        fields: What a flag's words mean follows the type of its field; all others are YAML.

    Raises:
        ConfigError: A file is missing, is not YAML, or holds no mapping.
    """
    types = {**MODEL_TYPES, **{entry.path: entry.annotation for entry in fields}}
    tree: Tree = {}
    for file in command.files:
        _lay_over(tree, _fold_model(_read_file(file)))
    problems = []
    for path, words in command.flags:
        try:
            _set(tree, path, parse_flag(words, types.get(field_path(path), Any)))
        except CoercionError as error:
            problems.append(Problem(path, error.problem, error.fix))
    return _resolve(_unfold_model(tree), problems)


def field_path(path: str) -> str:
    """The path of a field, whichever way of writing the `model` group `path` follows."""
    return path.replace("model.init_args.", "model.", 1) if path.startswith("model.") else path


def _read_file(file: Path) -> Tree:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            key="--config", problem=f"{file} cannot be read: {error}", fix="check the path"
        ) from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(
            key="--config", problem=f"{file} is not valid YAML: {where}", fix="mend that line"
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            key="--config",
            problem=f"{file} holds a {type(loaded).__name__}, not groups of settings",
            fix="start it with groups such as `model:` and `train:`",
        )
    return loaded


def _lay_over(tree: Tree, above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        below = tree.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            _lay_over(below, value)
        else:
            tree[key] = deepcopy(value)


def _fold_model(layer: Tree) -> Tree:
    """`layer` with the fields of a flat `model` group where another layer's class expects them."""
    model = layer.get("model")
    is_flat = isinstance(model, dict) and not {"class_path", "init_args"} & model.keys()
    return {**layer, "model": {"init_args": model}} if is_flat else layer


def _unfold_model(tree: Tree) -> Tree:
    """`tree` with a flat `model` group again where no layer named a class."""
    model = tree.get("model")
    if not isinstance(model, dict) or "init_args" not in model:
        return tree
    if "class_path" in model:
        return {**tree, "model": {"class_path": model["class_path"], **model}}
    is_flat = len(model) == 1 and isinstance(model["init_args"], dict)
    return {**tree, "model": model["init_args"]} if is_flat else tree


def _set(tree: Tree, path: str, value: Any) -> None:
    """Lay one flag over `tree`, whose `model` group is folded."""
    if path == "model":
        if not isinstance(value, str):
            tree.update(_fold_model({"model": value}))
            return
        path = "model.class_path"
    root, *rest = path.split(".")
    if root == "model" and rest[0] not in ("class_path", "init_args"):
        rest = ["init_args", *rest]
    *groups, leaf = (root, *rest)
    for group in groups:
        below = tree.get(group)
        if not isinstance(below, dict):
            below = {}
            tree[group] = below
        tree = below
    tree[leaf] = value


def walk_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; list items are `path.0`, `path.1`, ..."""
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from walk_leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _resolve(tree: Tree, problems: Iterable[Problem]) -> RawConfig:
    """Replace every `${...}` leaf by what it stands for."""
    resolved, found = deepcopy(tree), list(problems)
    config = None
    for path, value in walk_leaves(tree):
        if not is_interpolation(value):
            continue
        try:
            config = OmegaConf.create(_with_both_names(tree)) if config is None else config
            put_leaf(resolved, path, _select(config, path))
        except OmegaConfBaseException as error:
            first_line = str(error).splitlines()[0]
            problem = f"{value!r} cannot be resolved: {first_line}"
            found.append(Problem(path, problem, _interpolation_fix(value)))
    return RawConfig(tree, resolved, tuple(found))


def _with_both_names(tree: Tree) -> Tree:
    """`tree` with the fields under `model.init_args` under `model` too, for `${model.x}`."""
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(fields := model.get("init_args"), dict):
        return {**tree, "model": {**fields, **model}}
    return tree


def _select(config: DictConfig, path: str) -> Any:
    value = OmegaConf.select(config, path, throw_on_missing=True)
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True)
    return value


def _interpolation_fix(value: str) -> str:
    if "${oc.env:" in value:
        return "set that environment variable, or give a default: ${oc.env:NAME,default}"
    return "name a key that this configuration has"


def put_leaf(tree: Any, path: str, value: Any) -> None:
    """Set the leaf at `path`, made of keys and of list positions; missing groups are made."""
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree[int(key)] if isinstance(tree, list) else tree.setdefault(key, {})
    tree[int(leaf) if isinstance(tree, list) else leaf] = value
