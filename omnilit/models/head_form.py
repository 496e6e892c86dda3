"""Reading from a model's source what it does between its head and its loss.

A head that yields losses instead of logits is right only where nothing touches the logits after
it. Source is what says so; a list of names would be silent about the next release.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedModel

from omnilit.errors import ConfigError

_HARMLESS_METHODS: Final = frozenset({"float", "contiguous"})


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a forward does with the output of its head.

    Args:
        softcap_field: The field of the configuration that caps the logits where it is not None.
        refusal: Why the head cannot compute the loss; empty where it can.
    """

    softcap_field: str | None = None
    refusal: str = ""


def read_head(model: PreTrainedModel, head: str) -> HeadForm:
    """Classify the forward of `model`, whose output embeddings are its attribute `head`.

    Raises:
        ConfigError: Something other than a cap touches the logits; with the line that does.
    """
    source = inspect.getsource(inspect.unwrap(type(model).forward))
    forward = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(forward, ast.FunctionDef)
    form = classify_forward(forward, head)
    if form.refusal:
        raise ConfigError(
            key="model.config_path",
            problem=f"the loss of {type(model).__name__} cannot be computed in its head: "
            f"{form.refusal}",
            fix="choose an architecture that leaves the logits of its head alone",
        )
    return form


def classify_forward(forward: ast.FunctionDef, head: str) -> HeadForm:
    """Decide from the syntax of a `forward` whether `self.<head>` may yield losses.

    Allowed between head and loss: a cap by a field of the configuration under
    `if self.config.FIELD is not None`, `.float()` and `.contiguous()`, whatever runs only with
    labels (which we never pass), and returning.
    """
    arguments = forward.args.args + forward.args.kwonlyargs
    if "logits_to_keep" not in {argument.arg for argument in arguments}:
        return HeadForm(refusal="its forward has no logits_to_keep")
    assigned = [node for node in ast.walk(forward) if _is_head_call(_value_of(node), head)]
    calls = [node for node in ast.walk(forward) if _is_call_of(node, head)]
    if len(assigned) != 1 or len(calls) != 1:
        line = ast.unparse(calls[0]) if calls else f"self.{head} is never called"
        return HeadForm(refusal=f"the output of its head is not simply assigned ({line})")
    assignment = assigned[0]
    assert isinstance(assignment, ast.Assign)
    target = assignment.targets[0]
    if not isinstance(target, ast.Name):
        return HeadForm(refusal=f"the output of its head goes to {ast.unparse(target)}")
    return _classify_rest(forward, assignment, target.id)


def _classify_rest(forward: ast.FunctionDef, head: ast.Assign, logits: str) -> HeadForm:
    softcap_field = None
    for statement in _statements(forward.body):
        if statement is head or not _mentions(statement, logits):
            continue
        if isinstance(statement, ast.If):  # only caps get here whole
            softcap_field = _softcap_field(statement, logits)
            if softcap_field is not None:
                continue
        if not _only_passes_on(statement, logits):
            line = ast.unparse(statement).splitlines()[0]
            return HeadForm(refusal=f"it touches the logits after the head ({line})")
    return HeadForm(softcap_field)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run without labels, branches opened; a cap's branch is kept whole."""
    for statement in body:
        if not isinstance(statement, ast.If) or _config_field(statement.test) is not None:
            yield statement
            continue
        if ast.unparse(statement.test) != "labels is not None":
            yield ast.Expr(statement.test)
            yield from _statements(statement.body)
        yield from _statements(statement.orelse)


def _only_passes_on(statement: ast.stmt, logits: str) -> bool:
    """True for `return Output(logits=logits)` and `output = (logits,) + outputs[1:]`."""
    if not isinstance(statement, ast.Return | ast.Assign) or statement.value is None:
        return False
    holders = (ast.keyword, ast.Tuple)
    return sum(_is_name(child, logits) for child in ast.walk(statement)) == sum(
        _is_name(child, logits)
        for node in ast.walk(statement.value)
        if isinstance(node, holders)
        for child in ast.iter_child_nodes(node)
    )


def _softcap_field(branch: ast.If, logits: str) -> str | None:
    """The field of `if self.config.FIELD is not None:` around exactly a cap by that field."""
    field = _config_field(branch.test)
    cap = f"self.config.{field}"
    wanted = (
        {f"{logits} = {logits} / {cap}", f"{logits} = {logits}.float() / {cap}"},
        {f"{logits} = torch.tanh({logits})"},
        {f"{logits} = {logits} * {cap}"},
    )
    lines = [ast.unparse(statement) for statement in branch.body]
    is_cap = len(lines) == 3 and all(a in b for a, b in zip(lines, wanted, strict=True))
    return field if is_cap and not branch.orelse else None


def _config_field(test: ast.expr) -> str | None:
    prefix, suffix, text = "self.config.", " is not None", ast.unparse(test)
    if not (text.startswith(prefix) and text.endswith(suffix)):
        return None
    field = text[len(prefix) : -len(suffix)]
    return field if field.isidentifier() else None


def _mentions(node: ast.AST, name: str) -> bool:
    return any(_is_name(n, name) for n in ast.walk(node))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_call_of(node: ast.AST, head: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{head}"


def _value_of(node: ast.AST) -> ast.AST | None:
    return node.value if isinstance(node, ast.Assign) and len(node.targets) == 1 else None


def _is_head_call(node: ast.AST | None, head: str) -> bool:
    """True for `self.head(x)`, also behind methods that keep the values."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if _is_call_of(node, head):
            return True
        if node.func.attr not in _HARMLESS_METHODS:
            return False
        node = node.func.value
    return False
