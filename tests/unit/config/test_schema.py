from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omnilit.config.schema import Field, constructor_fields, dataclass_fields


@dataclass(frozen=True)
class Inner:
    """Inner.

    Args:
        size: How large
            it is.
    """

    size: int = 3


@dataclass(frozen=True)
class Outer:
    """Outer.

    Args:
        name: What it is called.
        inner: A group.
        tags: Some words.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    tags: list[str] = field(default_factory=list)


class Base:
    """Base.

    Args:
        path: Where.
        inner: A group.
        train: Supplied by code.
    """

    def __init__(
        self, *, path: str | None = None, inner: Inner | None = None, train: Outer | None = None
    ) -> None:
        pass


class Task(Base):
    """Task.

    Args:
        own: Its own field.
        path: Where, for this task.
    """

    def __init__(self, *, own: float, path: str = "here", **kwargs: Any) -> None:
        super().__init__(path=path, **kwargs)


class Grouped:
    """Grouped.

    Args:
        inner: A group.
    """

    def __init__(self, first: int = 0, *, inner: Inner = Inner()) -> None:
        pass


class Plain(Task):
    """Has no constructor of its own."""


def test_dataclass_fields_are_leaves_with_resolved_types_and_descriptions():
    assert dataclass_fields(Outer, "group") == [
        Field("group.name", str, None, required=True, description="What it is called."),
        Field("group.inner.size", int, 3, required=False, description="How large it is."),
        Field("group.tags", list[str], [], required=False, description="Some words."),
    ]


def test_constructor_fields_follow_forwarded_arguments_and_the_task_wins():
    found = constructor_fields(Plain, "model", hidden=frozenset({"train"}))
    assert [f.path for f in found] == ["model.own", "model.path", "model.inner"]
    assert found[0] == Field("model.own", float, None, required=True, description="Its own field.")
    assert found[1].default == "here"
    assert found[1].description == "Where, for this task."


def test_constructor_parameters_that_are_dataclasses_are_expanded():
    assert [f.path for f in constructor_fields(Grouped, "")] == ["inner.size"]


def test_a_constructor_that_forwards_nothing_hides_its_base():
    class Closed(Base):
        def __init__(self, *, only: int = 1) -> None:
            super().__init__()

    assert [f.path for f in constructor_fields(Closed, "m")] == ["m.only"]
