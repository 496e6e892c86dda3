"""Every message that an error of omnilit can show, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

PACKAGE: Final = Path(__file__).parents[2] / "omnilit"
# How each call that makes an error names its parts: kind, key, problem, fix; a number is the
# place of a positional argument
Part = str | int | None


class Shape(NamedTuple):
    """Where a call that makes an error has its parts: a keyword, or the place of an argument."""

    kind: str
    key: Part
    problem: Part
    fix: Part


SETTINGS: Final = "settings"
DATA: Final = "data"
CHECKPOINTS: Final = "checkpoints"
TRAINING: Final = "training"
SHAPES: Final[Mapping[str, Shape]] = {
    "ConfigError": Shape(SETTINGS, "key", "problem", "fix"),
    "KernelError": Shape(SETTINGS, "key", "problem", "fix"),
    "Problem": Shape(SETTINGS, 0, 1, 2),
    "_report": Shape(SETTINGS, 0, 1, 2),
    "CoercionError": Shape(SETTINGS, None, 0, 1),
    "DataError": Shape(DATA, None, "problem", "fix"),
    "refuse": Shape(DATA, None, 1, 2),
    "CheckpointError": Shape(CHECKPOINTS, None, 0, None),
    "TrainingError": Shape(TRAINING, None, "problem", "fix"),
}
MAX_DEPTH: Final = 3  # names that stand for names


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """One message.

    Args:
        kind: What it is about.
        key: The setting that it names; empty where that depends.
        problem: What it says; `<name>` stands for a value.
        fix: What it tells to do.
    """

    kind: str
    key: str
    problem: str
    fix: str


@cache
def find_messages(package: Path = PACKAGE) -> tuple[Message, ...]:
    """All messages of a package's source, sorted, each once."""
    found: set[Message] = set()
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found.update(_of_module(tree))
    return tuple(sorted(found))


def _of_module(tree: ast.Module) -> Iterator[Message]:
    outside = list(_assignments(tree.body))
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        inside = list(_assignments(ast.walk(function)))
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and _shape_of(n)]
        last = 0
        for call in sorted(calls, key=lambda node: node.lineno):
            yield from _of_call(call, Scope([*outside, *inside], since=last, until=call.lineno))
            last = call.lineno


class Assignment(NamedTuple):
    """What a name stands for from a line on."""

    name: str
    line: int
    value: ast.expr


class Scope(NamedTuple):
    """What is known at a call that makes an error.

    Args:
        known: All assignments of the module and the function.
        since: Line of the error before this one; what was assigned after it belongs to this one.
        until: Line of the call.
    """

    known: list[Assignment]
    since: int
    until: int

    def values(self, name: str) -> list[ast.expr]:
        """What a name may stand for: its assignments since the error before, else the last one."""
        found = [a for a in self.known if a.name == name and a.line <= self.until]
        own = [a for a in found if a.line > self.since]
        return [a.value for a in (own or found[-1:])]


def _assignments(nodes: Iterable[ast.AST]) -> Iterator[Assignment]:
    """What single names stand for, in these statements."""
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets: list[ast.expr] = [node.target]
        elif isinstance(node, ast.Assign):
            targets = node.targets
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and node.value is not None:
                yield Assignment(target.id, node.lineno, node.value)
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(name, ast.Name):
                        yield Assignment(name.id, node.lineno, value)


def _shape_of(call: ast.Call) -> Shape | None:
    return SHAPES.get(_name_of(call.func))


def _of_call(call: ast.Call, scope: Scope) -> Iterator[Message]:
    shape = _shape_of(call)
    assert shape is not None
    problem, fix, key = (_part(call, part) for part in (shape.problem, shape.fix, shape.key))
    if problem is None:
        return
    for text in _texts(problem, scope):
        said, _, inside = text.partition(". To fix: ")
        if not _has_words(said):
            continue  # handed on from where it is made
        keys = _texts(key, scope) if key is not None else [""]
        fixes = _texts(fix, scope) if fix is not None else [inside.rstrip(".")]
        shown = keys[0] if "<" not in keys[0] else ""
        yield Message(shape.kind, shown, said, fixes[0] if _has_words(fixes[0]) else "")


def _part(call: ast.Call, part: Part) -> ast.expr | None:
    names = ("key", "problem", "fix")
    for keyword in call.keywords:
        if keyword.arg == part or (isinstance(part, int) and keyword.arg == names[part]):
            return keyword.value
    if isinstance(part, int) and part < len(call.args):
        return call.args[part]
    return None


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _texts(node: ast.expr, scope: Scope, depth: int = 0) -> list[str]:
    """What an expression reads as; several texts where it chooses between some."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, scope, depth), *_texts(node.orelse, scope, depth)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _texts(node.left, scope, depth), _texts(node.right, scope, depth)
        return [one + other for one in left for other in right]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_piece(value, scope) for value in node.values)]
    if isinstance(node, ast.Name) and depth < MAX_DEPTH:
        found = [t for value in scope.values(node.id) for t in _texts(value, scope, depth + 1)]
        if told := [text for text in found if _has_words(text)]:
            return told
    return [f"<{_label(node)}>"]


def _piece(node: ast.expr, scope: Scope) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.FormattedValue)
    inner = node.value
    if isinstance(inner, ast.Name):
        (*_, known) = (None, *scope.values(inner.id))
        if isinstance(known, ast.Constant) and isinstance(known.value, str):
            return known.value
    text = f"<{_label(inner)}>"
    if isinstance(inner, ast.IfExp) or text == "<hint>":
        return ""  # something added now and then
    return f"'{text}'" if node.conversion == ord("r") else text


def _label(node: ast.expr) -> str:
    """A short name for a value."""
    match node:
        case ast.Name(id=name):
            label = {"view": "value", "self": "name"}.get(name, name)
        case ast.Attribute(value=inner, attr="name" | "strerror"):
            label = _label(inner)
        case ast.Attribute(attr=name):
            label = name
        case ast.Subscript(slice=ast.Constant(value=str(path))):
            label = path.rpartition(".")[2]
        case ast.Call(func=ast.Name(id="suggest")):
            label = "hint"
        case ast.Subscript(value=inner) | ast.Call(args=[inner, *_]) | ast.BinOp(left=inner):
            label = _label(inner)
        case ast.Call(func=ast.Attribute(value=inner)):
            label = _label(inner)
        case ast.GeneratorExp(generators=[part, *_]) | ast.ListComp(generators=[part, *_]):
            label = _label(part.iter)
        case _:
            label = "value"
    return label.strip("_")


def _has_words(text: str) -> bool:
    """Whether anything but places for values is in it."""
    inside = 0
    for letter in text:
        inside += (letter == "<") - (letter == ">")
        if not inside and letter.isalpha():
            return True
    return False
