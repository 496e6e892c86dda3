"""Reading from a model's source what it does between its head and its loss.

A head that yields losses instead of logits is right only where nothing touches the logits after
it. Source is what says so; a list of names would be silent about the next release.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from omnilit.errors import ConfigError

_TEXT_CONFIG: Final = "get_text_config()"
KEEP: Final = "logits_to_keep"
_HARMLESS_METHODS: Final = frozenset({"float", "contiguous"})


@dataclass(frozen=True, slots=True)
class Setting:
    """A number that a forward reads, by the expression that it reads it with.

    Args:
        owner: Attributes on the way from the model, such as `config` or `get_text_config()`.
        name: Of the number.
    """

    owner: tuple[str, ...]
    name: str

    @classmethod
    def of(cls, text: str) -> Setting | None:
        """Read `self.config.cap` and its like; None for other expressions."""
        first, *owner = text.split(".")
        steps = [step.removesuffix("()") if step == _TEXT_CONFIG else step for step in owner]
        if first != "self" or not owner or not all(step.isidentifier() for step in steps):
            return None
        return cls(tuple(owner[:-1]), owner[-1])

    def value(self, model: nn.Module) -> float | None:
        """What it is now."""
        return getattr(self._owner(model), self.name)

    @contextmanager
    def replaced(self, model: nn.Module, value: float | None) -> Iterator[None]:
        """Let the model read another value, also one that its configuration would refuse."""
        owner, before = self._owner(model), self.value(model)
        object.__setattr__(owner, self.name, value)
        try:
            yield
        finally:
            object.__setattr__(owner, self.name, before)

    def _owner(self, model: nn.Module) -> object:
        found: object = model
        for step in self.owner:
            name = step.removesuffix("()")
            found = getattr(found, name)() if name != step else getattr(found, name)
        return found


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a forward does with the output of its head.

    Args:
        softcap: What caps the logits where it is not None.
        scale: What the logits are multiplied by, before the cap.
        is_divisor: They are divided by it instead.
        refusal: Why the head cannot compute the loss; empty where it can.
        picks: The model gives its head the whole row, which is to pick from it.
    """

    softcap: Setting | None = None
    scale: Setting | None = None
    is_divisor: bool = False
    refusal: str = ""
    picks: bool = False

    def factor(self, model: nn.Module) -> float:
        """What the logits are multiplied by."""
        value = 1.0 if self.scale is None else self.scale.value(model)
        assert value is not None
        return 1.0 / value if self.is_divisor else value

    @contextmanager
    def taken_out(self, model: nn.Module) -> Iterator[None]:
        """Let the model leave its logits alone; its settings are put back behind."""
        with ExitStack() as stack:
            if self.softcap is not None:
                stack.enter_context(self.softcap.replaced(model, None))
            if self.scale is not None:
                stack.enter_context(self.scale.replaced(model, 1.0))
            yield


def read_head(model: PreTrainedModel, head: str, *, may_pick: bool = False) -> HeadForm:
    """Classify the forward of `model`, whose output embeddings are called `head`.

    Args:
        model: On any device.
        head: A child of the model, or inside of one: modules on the way to it may work on the
            hidden states before it.
        may_pick: Take a model whose forward has no `logits_to_keep`, too.

    Raises:
        ConfigError: Something other than a factor and a cap touches the logits; with the line.
    """
    child, *inside = head.split(".")
    form = classify_forward(_forward_of(model), child, may_pick=may_pick)
    wrapper = model
    for name, inner in pairwise([child, *inside]):
        wrapper = wrapper.get_submodule(name)
        form = replace(form, refusal=form.refusal or refuse_wrapper(_forward_of(wrapper), inner))
    if form.scale is not None and not isinstance(form.scale.value(model), int | float):
        form = HeadForm(refusal=f"it multiplies the logits by {form.scale.name}, which is trained")
    if form.refusal:
        raise ConfigError(
            key="model.config_path",
            problem=f"the loss of {type(model).__name__} cannot be computed in its head: "
            f"{form.refusal}",
            fix="choose an architecture that leaves the logits of its head alone",
        )
    return form


def _forward_of(module: nn.Module) -> ast.FunctionDef:
    source = inspect.getsource(inspect.unwrap(type(module).forward))
    forward = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(forward, ast.FunctionDef)
    return forward


def refuse_wrapper(forward: ast.FunctionDef, inner: str) -> str:
    """Why a module around the head does more than return what the head gave; empty if it does not.

    Args:
        forward: Of the module.
        inner: Its child that is the head, or is around it.
    """
    calls = [node for node in ast.walk(forward) if _is_call_of(node, inner)]
    *_, before, last = [None, None, *forward.body]
    value = last.value if isinstance(last, ast.Return) else None
    if isinstance(value, ast.Name) and isinstance(before, ast.Assign):
        is_same = len(before.targets) == 1 and _is_name(before.targets[0], value.id)
        value = before.value if is_same else None
    if len(calls) == 1 and value is calls[0]:
        return ""
    return f"what its {inner} gives is not simply returned"


def classify_forward(forward: ast.FunctionDef, head: str, *, may_pick: bool = False) -> HeadForm:
    """Decide from the syntax of a `forward` whether `self.<head>` may yield losses.

    Allowed between head and loss: a factor that is a setting of the model or its configuration, a
    cap by a setting under `if self.config.FIELD is not None`, `.float()` and `.contiguous()`,
    whatever runs only with labels (which we never pass), and returning.
    """
    arguments = forward.args.args + forward.args.kwonlyargs
    picks = KEEP not in {argument.arg for argument in arguments}
    if picks and not may_pick:
        return HeadForm(refusal=f"its forward has no {KEEP}")
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
    return replace(_classify_rest(forward, assignment, target.id), picks=picks)


def _classify_rest(forward: ast.FunctionDef, head: ast.Assign, logits: str) -> HeadForm:
    form = HeadForm()
    if isinstance(head.value, ast.BinOp):  # self.lm_head(x) * self.config.FIELD
        scaled = _scaled(head.value)
        if scaled is None:
            return HeadForm(refusal=f"it touches the logits after the head ({ast.unparse(head)})")
        form = scaled
    for statement in _statements(forward.body):
        if statement is head or not _mentions(statement, logits):
            continue
        if isinstance(statement, ast.If):  # only caps get here whole
            softcap = _softcap(statement, logits)
            if softcap is not None and form.softcap is None:
                form = replace(form, softcap=softcap)
                continue
        is_first = form == HeadForm()
        if is_first and (scaled := _scaled_again(statement, logits)) is not None:
            form = scaled
            continue
        if not _only_passes_on(statement, logits):
            line = ast.unparse(statement).splitlines()[0]
            return HeadForm(refusal=f"it touches the logits after the head ({line})")
    return form


def _scaled_again(statement: ast.stmt, logits: str) -> HeadForm | None:
    """What `logits = logits * self.FIELD` does."""
    value = _value_of(statement)
    if not isinstance(statement, ast.Assign) or not isinstance(value, ast.BinOp):
        return None
    is_same = _is_name(statement.targets[0], logits) and _is_name(value.left, logits)
    return _scaled(value) if is_same else None


def _scaled(value: ast.BinOp) -> HeadForm | None:
    setting = Setting.of(ast.unparse(value.right))
    if setting is None or not isinstance(value.op, ast.Mult | ast.Div):
        return None
    return HeadForm(scale=setting, is_divisor=isinstance(value.op, ast.Div))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run without labels, branches opened; a cap's branch is kept whole."""
    for statement in body:
        if not isinstance(statement, ast.If) or _tested(statement.test) is not None:
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


def _softcap(branch: ast.If, logits: str) -> Setting | None:
    """The setting of `if self.config.FIELD is not None:` around exactly a cap by it."""
    tested = _tested(branch.test)
    if tested is None:
        return None
    setting, cap = tested
    wanted = (
        {f"{logits} = {logits} / {cap}", f"{logits} = {logits}.float() / {cap}"},
        {f"{logits} = torch.tanh({logits})"},
        {f"{logits} = {logits} * {cap}"},
    )
    lines = [ast.unparse(statement) for statement in branch.body]
    is_cap = len(lines) == 3 and all(a in b for a, b in zip(lines, wanted, strict=True))
    return setting if is_cap and not branch.orelse else None


def _tested(test: ast.expr) -> tuple[Setting, str] | None:
    """The setting that a test asks not to be None, and what stands for it in the branch."""
    if not isinstance(test, ast.Compare) or not ast.unparse(test).endswith(" is not None"):
        return None
    asked = test.left
    read = asked.value if isinstance(asked, ast.NamedExpr) else asked
    setting = Setting.of(ast.unparse(read))
    if setting is None:
        return None
    return setting, asked.target.id if isinstance(asked, ast.NamedExpr) else ast.unparse(read)


def _mentions(node: ast.AST, name: str) -> bool:
    return any(_is_name(n, name) for n in ast.walk(node))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_call_of(node: ast.AST, head: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{head}"


def _value_of(node: ast.AST) -> ast.AST | None:
    return node.value if isinstance(node, ast.Assign) and len(node.targets) == 1 else None


def _is_head_call(node: ast.AST | None, head: str) -> bool:
    """True for `self.head(x)`, also behind methods that keep the values, and times something."""
    if isinstance(node, ast.BinOp):
        node = node.left
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if _is_call_of(node, head):
            return True
        if node.func.attr not in _HARMLESS_METHODS:
            return False
        node = node.func.value
    return False
