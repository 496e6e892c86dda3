import re
from pathlib import Path

import pytest

from omnilit.config.status import load_status

TESTS = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text("utf-8") for path in TESTS.rglob("*.py") if path != Path(__file__)}
AVAILABLE = {path: row for path, row in load_status().items() if row.status == "available"}


def is_set_somewhere(leaf: str) -> bool:
    """Whether a test gives the field a value: as a keyword, in a mapping, or by its flag."""
    setting = re.compile(rf"""\b{leaf}=[^=]|["']{leaf}["']\s*:|\.{leaf}["' ,]""")
    return any(setting.search(text) for text in SOURCES.values())


@pytest.mark.parametrize("path", AVAILABLE)
def test_some_test_gives_the_field_a_value(path):
    assert is_set_somewhere(path.rpartition(".")[2])
