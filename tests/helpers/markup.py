"""Reads the pages that the verbs write."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input"}


class Structure(HTMLParser):
    """Checks that every element is closed where it should be, and keeps what stands in it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag] = self.texts.get(tag, "") + data


def parse(page: str) -> Structure:
    """A page's elements, all of them closed."""
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure
