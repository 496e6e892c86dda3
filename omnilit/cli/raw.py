"""What a user gave, before anything is checked: files and flags merged into one tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnilit.errors import ConfigError, Problem

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """A verb's arguments, taken apart.

    Args:
        files: Configuration files, later ones over earlier ones.
        flags: Dotted path and value of each flag, in order; lists where several values followed.
        help_group: None without `--help`; "" for all of ours, else the group asked for.
        is_print_config: Print the configuration and stop.
    """

    files: tuple[Path, ...] = ()
    flags: tuple[tuple[str, Any], ...] = ()
    help_group: str | None = None
    is_print_config: bool = False


@dataclass(frozen=True, slots=True)
class RawConfig:
    """What was given, with and without its interpolations.

    Args:
        written: Files and flags merged, `${...}` kept.
        resolved: The same with `${...}` replaced.
        from_environment: Paths of leaves that held an environment variable.
        problems: Interpolations that cannot be resolved.
    """

    written: Tree
    resolved: Tree
    from_environment: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = field(default=())


def read_command(argv: Sequence[str]) -> Command:
    """Take apart the words after a verb.

    A flag is `--path value`, `--path=value`, or `--path` alone for true; a value is YAML.

    Raises:
        ConfigError: A word that belongs to no flag.
    """
    files: list[Path] = []
    flags: list[tuple[str, Any]] = []
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
            flags.append((name, _flag_value(values)))
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


def _flag_value(values: Sequence[str]) -> Any:
    if not values:
        return True
    parsed = [_parse_yaml(value) for value in values]
    return parsed if len(parsed) > 1 else parsed[0]


def _parse_yaml(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a prompt or a path with YAML's own characters is just text
    is_sentence = isinstance(value, dict) and not text.lstrip().startswith("{")
    return text if is_sentence else value


def merge(command: Command) -> RawConfig:
    """Read the files and lay the flags over them.

    Raises:
        ConfigError: A file is missing, is not YAML, or holds no mapping.
    """
    tree: Tree = {}
    for file in command.files:
        _lay_over(tree, _read_file(file))
    for path, value in command.flags:
        _set(tree, path, value)
    return _resolve(tree)


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


def _set(tree: Tree, path: str, value: Any) -> None:
    *groups, leaf = path.split(".")
    if path == "model" and isinstance(value, str):
        _name_task(tree, value)
        return
    if groups == ["model"] and leaf not in ("class_path", "init_args"):
        is_named = isinstance(tree.get("model"), dict) and "class_path" in tree["model"]
        groups = ["model", "init_args"] if is_named else groups
    for group in groups:
        below = tree.get(group)
        if not isinstance(below, dict):
            below = {}
            tree[group] = below
        tree = below
    tree[leaf] = value


def _name_task(tree: Tree, class_path: str) -> None:
    """`--model NAME`: keep the fields that a file gave, in the place that goes with a class."""
    group = tree.get("model")
    group = group if isinstance(group, dict) else {}
    init_args = group.get("init_args", group if "class_path" not in group else {})
    tree["model"] = {"class_path": class_path, "init_args": init_args}


def walk_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; list items are `path.0`, `path.1`, ..."""
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from walk_leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _resolve(tree: Tree) -> RawConfig:
    """Replace every `${...}` leaf by what it stands for."""
    resolved, problems, secret = deepcopy(tree), [], set()
    config = None
    for path, value in list(walk_leaves(tree)):
        if not (isinstance(value, str) and "${" in value):
            continue
        if "${oc.env:" in value:
            secret.add(path)
        try:
            config = OmegaConf.create(tree) if config is None else config
            _replace(resolved, path, OmegaConf.select(config, path, throw_on_missing=True))
        except OmegaConfBaseException as error:
            first_line = str(error).splitlines()[0]
            problem = f"{value!r} cannot be resolved: {first_line}"
            problems.append(Problem(path, problem, _interpolation_fix(value)))
    return RawConfig(tree, resolved, frozenset(secret), tuple(problems))


def _interpolation_fix(value: str) -> str:
    if "${oc.env:" in value:
        return "set that environment variable, or give a default: ${oc.env:NAME,default}"
    return "name a key that this configuration has"


def _replace(tree: Any, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    tree[int(leaf) if isinstance(tree, list) else leaf] = value
